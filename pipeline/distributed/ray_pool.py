"""The pool of workers on a Ray cluster: how many the machines hold, what each asks for, and how lost ones are replaced.

Each worker is a Ray actor that is bound to one machine.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import JobError, PipelineError, one_line
from pipeline.execution.lease_worker import LeaseWorker
from pipeline.execution.quarantine import MOST_DEATHS
from pipeline.execution.worker_pool import CALLS_AT_ONCE, NEVER_STARTED, Death, WorkerHandle, WorkerLost, WorkerPool
from pipeline.job.job import Job, Scale
from pipeline.report import WorkerReport
from turboquant.runtime.versions import package_versions

_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BETWEEN_WARNINGS = 30.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """A node of the cluster: Ray's id for it, its host name, and its resources."""

    node: str
    host: str
    resources: Mapping[str, float]


@dataclass(eq=False, kw_only=True)
class RayHandle(WorkerHandle):
    """A worker on a machine of the cluster. actor: Ray's handle of it."""

    machine: Machine
    actor: Any

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method of the actor."""
        future: Future[Any] = getattr(self.actor, method).remote(*arguments).future()
        return future

    def result(self, future: Future[Any]) -> Any:
        """Return what a call returned. Ray's exceptions become ours."""
        try:
            return future.result()
        except RayTaskError as error:
            raise PipelineError(f"worker {self.name}: {one_line(error)}") from error
        except RayError as error:
            if getattr(error, "actor_init_failed", False):
                reason = str(error).strip().splitlines()[-1]
                raise JobError(
                    f"worker {self.name} cannot be started; install the same packages there: {reason}"
                ) from None
            raise WorkerLost(one_line(error)) from error


class RayPool(WorkerPool):
    """As many workers as the cluster holds, or as the job's ``scale`` says. Ray must be connected."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job
        self._numbers = count(1)
        self._failed_starts: Counter[str] = Counter()  # by node
        self._last_look = float("-inf")
        self._last_ready = time.monotonic()  # when a worker was ready, or a warning said that none is

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions of packages, which are the same on all machines; each worker has its own device."""
        return package_versions()

    def start_missing(self) -> list[WorkerHandle]:
        """Start workers where there is room, and return the new ones. The cluster is looked at every two seconds."""
        now = time.monotonic()
        if now - self._last_look < _SECONDS_BETWEEN_LOOKS:
            return []
        is_first, self._last_look = self._last_look < 0, now
        if any(worker.store is not None for worker in self.workers.values()):
            self._last_ready = now
        alive = machines()
        started: list[WorkerHandle] = [
            self._start(machine, options)
            for machine, options in workers_by_machine(self._job.scale, alive)
            if self._failed_starts[machine.node] < MOST_DEATHS
            for _ in range(self._missing(machine, options.pop("workers")))
        ]
        self._check_progress(alive, is_first, now)
        return started

    def remove(self, worker: WorkerHandle, error: WorkerLost) -> Death:
        """Remove a worker that was lost. Its machine may be lost with it."""
        assert isinstance(worker, RayHandle)
        _log.debug("worker %s: %s", worker.name, error)
        self.workers.pop(worker.name, None)
        with suppress(Exception):
            ray.kill(worker.actor)
        is_machine_alive = any(machine.node == worker.machine.node for machine in machines())
        if worker.store is None and is_machine_alive:
            self._failed_starts[worker.machine.node] += 1
        self._last_look = 0.0
        cause = f"died on {worker.machine.host}" if is_machine_alive else "was lost with its machine"
        return Death(cause, by_machine=not is_machine_alive)

    def note_ready(self, worker: WorkerHandle) -> None:
        """Note that a worker is ready."""
        assert isinstance(worker, RayHandle)
        self._failed_starts.pop(worker.machine.node, None)

    def reports(self, worker: WorkerHandle) -> dict[str, WorkerReport]:
        """Return the worker's report."""
        return {worker.name: worker.report}

    def close(self) -> None:
        """Do nothing: workers end with the connection to Ray."""

    def _missing(self, machine: Machine, workers: int) -> int:
        running = sum(
            isinstance(worker, RayHandle) and worker.machine.node == machine.node for worker in self.workers.values()
        )
        most = self._job.scale.workers
        return max(0, min(workers - running, workers if most is None else most - len(self.workers)))

    def _start(self, machine: Machine, options: Mapping[str, Any]) -> RayHandle:
        placement = NodeAffinitySchedulingStrategy(machine.node, soft=False)
        actor = ray.remote(LeaseWorker).options(**options, max_concurrency=CALLS_AT_ONCE, scheduling_strategy=placement)
        name = f"{machine.host}/{next(self._numbers)}"
        level = logging.getLogger("pipeline").getEffectiveLevel()
        worker = RayHandle(name, machine=machine, actor=actor.remote(self._job, level))
        self.workers[name] = worker
        _log.debug("worker %s is started", name)
        return worker

    def _check_progress(self, alive: list[Machine], is_first: bool, now: float) -> None:
        """Warn if no worker is ready for a while. Raise an error if waiting is of no use."""
        failed = [machine.host for machine in alive if self._failed_starts[machine.node] >= MOST_DEATHS]
        if failed and not self.workers:
            raise PipelineError(f"the model's process died on {failed[0]}, {NEVER_STARTED}")
        if is_first and not self.workers:
            raise JobError(f"scale: none of the cluster's {len(alive):,} machines has what a worker asks for")
        if now - self._last_ready > _SECONDS_BETWEEN_WARNINGS:
            self._last_ready = now
            waiting = f"{len(self.workers):,} load the model, or wait for room" if self.workers else "machines may join"
            _log.warning("no worker is ready: %s in the cluster", waiting)


def machines() -> list[Machine]:
    """Return the cluster's machines that are alive."""
    return [
        Machine(node["NodeID"], node["NodeManagerHostname"], node["Resources"]) for node in ray.nodes() if node["Alive"]
    ]


def workers_by_machine(scale: Scale, alive: list[Machine]) -> list[tuple[Machine, dict[str, Any]]]:
    """Return the machines that hold workers: how many, as ``workers``, and Ray's options for each worker.

    >>> mac = Machine("1", "mac", {"CPU": 10.0, "mac": 1.0})
    >>> workers_by_machine(Scale(), [mac])[0][1]
    {'workers': 1, 'num_cpus': 10, 'num_gpus': 0, 'resources': {}}
    >>> workers_by_machine(Scale(num_cpus=4), [mac])[0][1]["workers"]
    2
    """
    gpus = scale.num_gpus
    if gpus is None:
        gpus = 1 if any(machine.resources.get("GPU") for machine in alive) else 0
    needed = (
        dict(scale.resources) | ({"GPU": gpus} if gpus else {}) | ({"CPU": scale.num_cpus} if scale.num_cpus else {})
    )
    found: list[tuple[Machine, dict[str, Any]]] = []
    for machine in alive:
        has = machine.resources
        room = [int(has.get(name, 0) / amount + 1e-9) for name, amount in needed.items()]
        workers = min(room, default=1) if has.get("CPU") else 0
        if workers:
            cpus = scale.num_cpus or max(1, int(has["CPU"]) // workers)
            options = {"num_cpus": cpus, "num_gpus": gpus, "resources": dict(scale.resources)}
            found.append((machine, {"workers": workers, **options}))
    return found
