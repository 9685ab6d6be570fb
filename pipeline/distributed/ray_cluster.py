"""A run on a Ray cluster: connects to it, runs the job with workers there, and lets it go.

This process reads the inputs, hands out documents and writes the result; models are loaded by the workers alone. Knows
addresses and how connecting fails; nothing of how a run is done.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from pipeline.errors import JobError, RemoteError, one_line
from pipeline.job.shards import Shard
from pipeline.report import Report
from pipeline.retry import OnFailure
from pipeline.run.display import RunDisplay
from pipeline.run.worker import Finished, Message, MessageObserver

if TYPE_CHECKING:
    from pipeline.job.job import Job

LOCAL, CLIENT = "ray", "ray://"
SECONDS_TO_CONNECT = 10.0
_CRASHED = "Starting Ray client server failed"  # as a child of the head does now and then, in gRPC behind a fork
_OBJECT_STORE = 512 << 20  # bytes: only leases and answers pass through it
# What Ray reads when it is imported. It would print dozens of lines of its own logs for each worker or node that is
# lost, which the run's log says in one, and a warning of what another version is going to do.
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
    on_failure: OnFailure | None = None,
    metrics: Path | None = None,
    shard: Shard | None = None,
) -> Report:
    """Run a job, or resume it, on the cluster at an address; the rest, and what is returned, is as of `supervise`.

    Raises JobError where Ray is not installed, the address is none or the job's model is to be in several processes,
    RemoteError where nothing answers there.
    """
    if job.scale.ranks > 1:
        raise JobError("scale.ranks: on a Ray cluster each worker holds the whole model; set it to 1")
    _check_address(address)
    name = f"{job.name} {shard}" if shard else job.name
    with RunDisplay(name, quiet, metrics) as view, _connected(address):
        from pipeline.distributed.ray_executor import RayExecutor
        from pipeline.run.runner import Runner

        lock = Lock()

        def show(message: Message) -> None:
            with lock:  # documents are done in another thread
                view.show(message)

        runner = Runner(job, watch=partial(MessageObserver, show), on_failure=on_failure, shard=shard, crew=RayExecutor)
        report = runner.run()
        view.show(Finished(report))
        return report


def _check_address(address: str) -> None:
    """Import Ray. Raises JobError where it is not installed, or an address is none that a run may be on."""
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
    """While the block runs, Ray is connected; where the cluster was started for that, it ends too."""
    import ray

    there = os.environ.get("RAY_ADDRESS", "local") if address == LOCAL else address
    _check_reachable(address, there)
    try:
        _connect(address, there)
        yield
    finally:
        ray.shutdown()


def _connect(address: str, there: str) -> None:
    import ray

    options = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if there == "local" else {}
    for tries_left in (1, 0):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of what then is an error
                ray.init(there, log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except Exception as error:
            ray.shutdown()
            told = f"--on {address}: no connection to Ray at {there}: {one_line(error)}"
            if not tries_left or _CRASHED not in str(error):
                raise RemoteError(told) from error
            _log.warning("%s; trying once more", told)


def _check_reachable(address: str, there: str) -> None:
    host, _, port = there.removeprefix(CLIENT).rpartition(":")
    if not host:  # it is found by Ray, or started
        return
    try:
        socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
    except (OSError, ValueError, OverflowError) as error:
        raise RemoteError(
            f"--on {address}: nothing answers at {there} within {SECONDS_TO_CONNECT:g} s ({one_line(error)}); start "
            "the cluster with `ray start --head`, and see that this port of the head can be reached from here"
        ) from None
