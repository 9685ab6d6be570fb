"""A run on a Ray cluster: connect to the cluster, run the job with workers there, disconnect.

This process reads the inputs, gives documents to the workers and writes the result. Only the workers load models.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from pipeline.errors import JobError, RemoteError, one_line
from pipeline.execution.context import RunOptions
from pipeline.execution.display import RunDisplay
from pipeline.execution.messages import Finished, Message, MessageObserver
from pipeline.job.shards import Shard
from pipeline.report import Report

if TYPE_CHECKING:
    from pipeline.job.job import Job

LOCAL, CLIENT = "ray", "ray://"
SECONDS_TO_CONNECT = 10.0
_CRASHED = "Starting Ray client server failed"  # sometimes gRPC crashes in a child that the head has forked
_OBJECT_STORE = 512 << 20  # bytes; only leases and answers pass through it
# Ray reads these variables when it is imported. Without them it prints dozens of lines for each lost worker, of which
# the run's log says all that matters in one line, and a warning about a future version.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_log = logging.getLogger(__name__)


def run_on_ray(
    job: Job,
    address: str,
    quiet: bool = False,
    options: RunOptions | None = None,
    metrics: Path | None = None,
    shard: Shard | None = None,
) -> Report:
    """Run a job, or resume it, on the cluster at an address. Other arguments and the result are those of `supervise`.

    Raises JobError if Ray is not installed, the address is not valid, or the job's model needs several processes;
    RemoteError if nothing answers at the address.
    """
    if job.scale.ranks > 1:
        raise JobError("scale.ranks: on a Ray cluster each worker holds the whole model; set it to 1")
    _check_address(address)
    name = f"{job.name} {shard}" if shard else job.name
    with RunDisplay(name, quiet, metrics) as display, _connected(address):
        from pipeline.distributed.ray_pool import RayPool
        from pipeline.execution.pool_executor import PoolExecutor
        from pipeline.execution.runner import Runner

        lock = Lock()

        def show(message: Message) -> None:
            with lock:  # another thread says that documents are done
                display.show(message)

        runner = Runner(
            job,
            MessageObserver(show),
            options=options,
            shard=shard,
            executor=lambda context, inputs, finished: PoolExecutor(context, inputs, finished, RayPool(job)),
        )
        report = runner.run()
        display.show(Finished(report))
        return report


def _check_address(address: str) -> None:
    """Import Ray. Raises JobError if it is not installed or the address is not valid."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if address != LOCAL and not (address.startswith(CLIENT) and host and port.isdecimal()):
        raise JobError(f"--on {address}: expected ray, or ray://HOST:PORT with the client port of a head, mostly 10001")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray  # noqa: F401
    except ImportError:
        raise JobError(
            f"--on {address}: needs the package ray, here and on the other machines; install it with "
            "`pip install 'turboquant-pipeline[ray]'`"
        ) from None


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connect to Ray while the block runs. A cluster that was started for the run ends with it."""
    import ray

    target = os.environ.get("RAY_ADDRESS", "local") if address == LOCAL else address
    _check_reachable(address, target)
    try:
        _connect(address, target)
        yield
    finally:
        ray.shutdown()


def _connect(address: str, target: str) -> None:
    import ray

    options = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if target == "local" else {}
    for tries_left in (1, 0):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Ray warns of what it then raises
                ray.init(target, log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except Exception as error:
            ray.shutdown()
            message = f"--on {address}: no connection to Ray at {target}: {one_line(error)}"
            if not tries_left or _CRASHED not in str(error):
                raise RemoteError(message) from error
            _log.warning("%s; trying once more", message)


def _check_reachable(address: str, target: str) -> None:
    host, _, port = target.removeprefix(CLIENT).rpartition(":")
    if not host:  # Ray finds the cluster, or starts one
        return
    try:
        socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
    except (OSError, ValueError, OverflowError) as error:
        raise RemoteError(
            f"--on {address}: nothing answers at {target} within {SECONDS_TO_CONNECT:g} s ({one_line(error)}); start "
            "the cluster with `ray start --head`, and see that this port of the head can be reached from here"
        ) from None
