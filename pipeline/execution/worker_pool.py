"""The workers of a run, as the executor sees them: processes with a model each, on this machine or on others.

ray_pool.py has those on the machines of a Ray cluster, process_pool.py those on this machine.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.execution.lease_worker import TokenCounts, WorkerReply
from pipeline.execution.leases import Lease
from pipeline.report import WorkerReport

LEASES_PER_WORKER = 2  # one is answered while the other waits, so that the worker never waits
CALLS_AT_ONCE = LEASES_PER_WORKER + 2  # the leases, and calls to the worker meanwhile
NEVER_STARTED = (
    "twice, before a document was in hand, most likely while the model was loaded; what was committed is kept, and the "
    "same command resumes"
)


class WorkerLost(Exception):
    """A worker does not answer any more. `WorkerPool.remove` says what became of it."""


@dataclass(eq=False)
class WorkerHandle(ABC):
    """The executor's view of one worker.

    store: the name of its store, None until it is ready. leases: what it was given; it works on the first.
    leases_given: how many it was ever given. prefill_seconds: as far as its replies tell. ready_since: on the monotonic
    clock. shown: what the observer counts already. rows_answered: the rows of its leases that are answered.
    """

    name: str
    store: str | None = None
    leases: deque[Lease] = field(default_factory=deque)
    leases_given: int = 0
    report: WorkerReport = field(default_factory=lambda: WorkerReport("", 0, ""))
    prefill_seconds: float = 0.0
    ready_since: float = 0.0
    shown: TokenCounts = field(default_factory=TokenCounts)
    rows_answered: int = 0

    @abstractmethod
    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method of the worker, see lease_worker.py. The future ends with an exception if the worker is lost."""

    @abstractmethod
    def result(self, future: Future[Any]) -> Any:
        """Return what a call returned.

        Raises WorkerLost; JobError if the worker cannot be started on its machine, PipelineError for other failures.
        """

    @property
    def has_room(self) -> bool:
        """Whether it may be given another lease."""
        return len(self.leases) < LEASES_PER_WORKER and not (self.leases and self.leases[0].is_suspect)

    def count(self, reply: WorkerReply) -> None:
        """Add what a reply says to the worker's report."""
        results = reply.results or ()
        seconds = max(time.monotonic() - self.ready_since, 1e-9)
        documents = self.report.documents + len(results)
        rows = sum(len(result.rows) for result in results)
        answers = self.report.answers + rows
        tokens = self.report.prefilled_tokens + reply.stats.prefilled_tokens
        self.rows_answered += rows
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


@dataclass(frozen=True)
class Death:
    """The end of a worker. cause: as the end of a sentence. by_machine: it was lost with its machine."""

    cause: str
    by_machine: bool = False


class WorkerPool(ABC):
    """The workers of one run. ``workers``: those that live, as far as is known, by name.

    processes: how many share this machine. seconds_between_counts: how long no worker tells of its work until all of
    them are asked.
    """

    processes = 1
    seconds_between_counts = 5.0

    def __init__(self) -> None:
        self.workers: dict[str, WorkerHandle] = {}

    @property
    @abstractmethod
    def versions(self) -> Mapping[str, str]:
        """The versions that compute the answers, as far as they are the same for all workers."""

    @abstractmethod
    def start_missing(self) -> list[WorkerHandle]:
        """Start workers where there is room, and return the new ones. May be called often.

        Raises JobError if no machine has what a worker asks for, PipelineError if no worker can be started.
        """

    @abstractmethod
    def note_ready(self, worker: WorkerHandle) -> None:
        """Note that a worker is ready."""

    @abstractmethod
    def remove(self, worker: WorkerHandle, error: WorkerLost) -> Death:
        """Remove a worker that was lost, and return what became of it."""

    @abstractmethod
    def reports(self, worker: WorkerHandle) -> dict[str, WorkerReport]:
        """Return what the run's report says about a worker, by its name; nothing if workers are not told apart."""

    @abstractmethod
    def close(self) -> None:
        """End all workers."""
