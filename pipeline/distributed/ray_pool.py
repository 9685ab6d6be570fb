"""The pool of workers on a Ray cluster: how many the machines hold, what each asks for, and how lost ones are replaced.

Each worker is a Ray actor that is bound to one machine.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.distributed.leases import Lease
from pipeline.distributed.ray_worker import RayWorker, TokenCounts, WorkerReply
from pipeline.errors import JobError, PipelineError
from pipeline.execution.quarantine import MOST_DEATHS
from pipeline.job.job import Job, Scale
from pipeline.report import WorkerReport

LEASES_PER_WORKER = 2  # one is answered while the other waits, so that the worker never waits
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BETWEEN_WARNINGS = 30.0
_CALLS_AT_ONCE = LEASES_PER_WORKER + 2  # the leases, and calls to the worker meanwhile
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """A node of the cluster: Ray's id for it, its host name, and its resources."""

    node: str
    host: str
    resources: Mapping[str, float]


@dataclass(eq=False)
class WorkerHandle:
    """The driver's view of one worker.

    store: the name of its store, None until it is ready. leases: what it was given; it works on the first.
    leases_given: how many it was ever given. prefill_seconds: as far as its replies tell. ready_since: on the monotonic
    clock. tokens_shown: what the observer counts already.
    """

    name: str
    machine: Machine
    actor: Any
    store: str | None = None
    leases: deque[Lease] = field(default_factory=deque)
    leases_given: int = 0
    report: WorkerReport = field(default_factory=lambda: WorkerReport("", 0, ""))
    prefill_seconds: float = 0.0
    ready_since: float = 0.0
    tokens_shown: TokenCounts = field(default_factory=TokenCounts)

    @property
    def has_room(self) -> bool:
        """Whether it may be given another lease."""
        return len(self.leases) < LEASES_PER_WORKER and not (self.leases and self.leases[0].is_suspect)

    def count(self, reply: WorkerReply) -> None:
        """Add what a reply says to the worker's report."""
        results = reply.results or ()
        seconds = max(time.monotonic() - self.ready_since, 1e-9)
        documents = self.report.documents + len(results)
        answers = self.report.answers + sum(len(result.rows) for result in results)
        tokens = self.report.prefilled_tokens + reply.stats.prefilled_tokens
        self.prefill_seconds += reply.stats.prefill_seconds
        self.report = replace(
            self.report,
            documents=documents,
            answers=answers,
            prefilled_tokens=tokens,
            documents_per_second=documents / seconds,
            answers_per_second=answers / seconds,
            prefill_tokens_per_second=tokens / max(self.prefill_seconds, 1e-9),
        )


class WorkerPool:
    """The workers of one run. ``workers``: those that live, as far as is known, by name."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.workers: dict[str, WorkerHandle] = {}
        self._numbers = count(1)
        self._failed_starts: Counter[str] = Counter()  # by node
        self._last_look = float("-inf")
        self._last_ready = time.monotonic()  # when a worker was ready, or a warning said that none is

    def start_missing(self) -> list[WorkerHandle]:
        """Start workers where there is room, and return the new ones. The cluster is looked at every two seconds.

        Raises JobError if no machine has what a worker asks for, PipelineError if no worker can be started.
        """
        now = time.monotonic()
        if now - self._last_look < _SECONDS_BETWEEN_LOOKS:
            return []
        is_first, self._last_look = self._last_look < 0, now
        if any(worker.store is not None for worker in self.workers.values()):
            self._last_ready = now
        alive = machines()
        started = [
            self._start(machine, options)
            for machine, options in workers_by_machine(self._job.scale, alive)
            if self._failed_starts[machine.node] < MOST_DEATHS
            for _ in range(self._missing(machine, options.pop("workers")))
        ]
        self._check_progress(alive, is_first, now)
        return started

    def remove(self, worker: WorkerHandle) -> bool:
        """Remove a dead worker and return whether its machine is still alive."""
        self.workers.pop(worker.name, None)
        with suppress(Exception):
            ray.kill(worker.actor)
        is_machine_alive = any(machine.node == worker.machine.node for machine in machines())
        if worker.store is None and is_machine_alive:
            self._failed_starts[worker.machine.node] += 1
        self._last_look = 0.0
        return is_machine_alive

    def has_started(self, worker: WorkerHandle) -> None:
        """Note that a worker is ready."""
        self._failed_starts.pop(worker.machine.node, None)

    def _missing(self, machine: Machine, workers: int) -> int:
        running = sum(worker.machine.node == machine.node for worker in self.workers.values())
        most = self._job.scale.workers
        return max(0, min(workers - running, workers if most is None else most - len(self.workers)))

    def _start(self, machine: Machine, options: Mapping[str, Any]) -> WorkerHandle:
        placement = NodeAffinitySchedulingStrategy(machine.node, soft=False)
        actor = ray.remote(RayWorker).options(**options, max_concurrency=_CALLS_AT_ONCE, scheduling_strategy=placement)
        name = f"{machine.host}/{next(self._numbers)}"
        level = logging.getLogger("pipeline").getEffectiveLevel()
        self.workers[name] = WorkerHandle(name, machine, actor.remote(self._job, level))
        _log.debug("worker %s is started", name)
        return self.workers[name]

    def _check_progress(self, alive: list[Machine], is_first: bool, now: float) -> None:
        """Warn if no worker is ready for a while. Raise an error if waiting is of no use."""
        failed = [machine.host for machine in alive if self._failed_starts[machine.node] >= MOST_DEATHS]
        if failed and not self.workers:
            raise PipelineError(
                f"the model's process died on {failed[0]}, twice, before a document was in hand, most likely while the "
                "model was loaded; what was committed is kept, and the same command resumes"
            )
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
