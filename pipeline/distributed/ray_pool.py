"""Workers on a Ray cluster: how many its machines hold, what each asks for, and that lost ones are replaced.

Each is an actor that is bound to a machine. Knows Ray's nodes and actors, and the job's ``scale``; nothing of what
workers do.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.distributed.leases import Lease
from pipeline.distributed.ray_worker import RayWorker
from pipeline.errors import JobError, PipelineError
from pipeline.job.job import Job, Scale
from pipeline.report import Report, WorkerReport
from pipeline.retry import DEATHS

_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_BETWEEN_WARNINGS = 30.0
LEASES = 2  # of a worker: one at work, and one that waits, so that the worker never does
_CALLS_AT_ONCE = LEASES + 2  # and what is said to a worker meanwhile
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """A node of the cluster: Ray's name of it, its host's, and its resources."""

    node: str
    host: str
    resources: Mapping[str, float]


@dataclass(eq=False)
class WorkerHandle:
    """One worker, from outside. ``store``: its store's name, None until it is ready. ``leases``: the first is at work.

    handed: how many leases it was given. report: what it had done when it last said something. since: when it was
    ready, on the monotonic clock.
    """

    name: str
    machine: Machine
    actor: Any
    store: str | None = None
    leases: deque[Lease] = field(default_factory=deque)
    handed: int = 0
    report: Report = field(default_factory=Report)
    about: WorkerReport = field(default_factory=lambda: WorkerReport("", 0, ""))
    since: float = 0.0

    @property
    def has_room(self) -> bool:
        """Whether it may be handed another lease."""
        return len(self.leases) < LEASES and not (self.leases and self.leases[0].is_suspect)


class WorkerPool:
    """The workers of one run, which end with it. ``members``: those that live, as far as is known, by name."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.members: dict[str, WorkerHandle] = {}
        self._numbers = count(1)
        self._failures: Counter[str] = Counter()  # of starts, by node
        self._last_look = float("-inf")
        self._last_ready = time.monotonic()  # when somebody was, or a warning said that nobody is

    def look(self) -> list[WorkerHandle]:
        """Start workers where there is room, and return those; now and then it really looks.

        Raises JobError where no machine has what a worker asks for, PipelineError where none can be started.
        """
        now = time.monotonic()
        if now - self._last_look < _SECONDS_BETWEEN_LOOKS:
            return []
        is_first, self._last_look = self._last_look < 0, now
        if any(member.store is not None for member in self.members.values()):
            self._last_ready = now
        there = machines()
        started = [
            self._start(machine, options)
            for machine, options in wanted(self._job.scale, there)
            if self._failures[machine.node] < DEATHS
            for _ in range(self._missing(machine, options.pop("workers")))
        ]
        self._explain(there, is_first, now)
        return started

    def lose(self, member: WorkerHandle) -> bool:
        """It is dead, or as good as that; whether its machine is still there."""
        self.members.pop(member.name, None)
        with suppress(Exception):
            ray.kill(member.actor)
        is_there = any(machine.node == member.machine.node for machine in machines())
        if member.store is None and is_there:
            self._failures[member.machine.node] += 1
        self._last_look = 0.0
        return is_there

    def is_ready(self, member: WorkerHandle) -> None:
        """It has started."""
        self._failures.pop(member.machine.node, None)

    def _missing(self, machine: Machine, workers: int) -> int:
        there = sum(member.machine.node == machine.node for member in self.members.values())
        most = self._job.scale.workers
        return max(0, min(workers - there, workers if most is None else most - len(self.members)))

    def _start(self, machine: Machine, options: Mapping[str, Any]) -> WorkerHandle:
        placed = NodeAffinitySchedulingStrategy(machine.node, soft=False)
        actor = ray.remote(RayWorker).options(**options, max_concurrency=_CALLS_AT_ONCE, scheduling_strategy=placed)
        name = f"{machine.host}/{next(self._numbers)}"
        level = logging.getLogger("pipeline").getEffectiveLevel()
        self.members[name] = WorkerHandle(name, machine, actor.remote(self._job, level))
        _log.debug("worker %s is started", name)
        return self.members[name]

    def _explain(self, there: list[Machine], is_first: bool, now: float) -> None:
        """Say that nobody works for a while, or raise why where waiting is no use."""
        failed = [machine.host for machine in there if self._failures[machine.node] >= DEATHS]
        if failed and not self.members:
            raise PipelineError(
                f"the model's process died on {failed[0]}, twice, before a document was in hand, most likely while the "
                "model was loaded; what was committed is kept, and the same command resumes"
            )
        if is_first and not self.members:
            raise JobError(f"scale: none of the cluster's {len(there):,} machines has what a worker asks for")
        if now - self._last_ready > _SECONDS_BETWEEN_WARNINGS:
            self._last_ready = now
            waiting = f"{len(self.members):,} load the model, or wait for room" if self.members else "machines may join"
            _log.warning("no worker is ready: %s in the cluster", waiting)


def machines() -> list[Machine]:
    """The cluster's machines that are alive."""
    return [
        Machine(node["NodeID"], node["NodeManagerHostname"], node["Resources"]) for node in ray.nodes() if node["Alive"]
    ]


def wanted(scale: Scale, there: list[Machine]) -> list[tuple[Machine, dict[str, Any]]]:
    """For each machine that holds workers, how many, as ``workers``, and Ray's options of what each asks for.

    >>> mac = Machine("1", "mac", {"CPU": 10.0, "mac": 1.0})
    >>> wanted(Scale(), [mac])[0][1]
    {'workers': 1, 'num_cpus': 10, 'num_gpus': 0, 'resources': {}}
    >>> wanted(Scale(num_cpus=4), [mac])[0][1]["workers"]
    2
    """
    gpus = scale.num_gpus
    if gpus is None:
        gpus = 1 if any(machine.resources.get("GPU") for machine in there) else 0
    asked = (
        dict(scale.resources) | ({"GPU": gpus} if gpus else {}) | ({"CPU": scale.num_cpus} if scale.num_cpus else {})
    )
    found: list[tuple[Machine, dict[str, Any]]] = []
    for machine in there:
        has = machine.resources
        room = [int(has.get(name, 0) / amount + 1e-9) for name, amount in asked.items()]
        workers = min(room, default=1) if has.get("CPU") else 0
        if workers:
            cpus = scale.num_cpus or max(1, int(has["CPU"]) // workers)
            options = {"num_cpus": cpus, "num_gpus": gpus, "resources": dict(scale.resources)}
            found.append((machine, {"workers": workers, **options}))
    return found
