"""A worker of a run on many machines: a process with a model of its own, that answers the leases it is handed.

Knows a job, and where it is itself. It does not know which documents the job has, who else answers them, or what
becomes of rows. Whoever hands out leases imports this too, so what is heavy is imported by the method that needs it.
"""

from __future__ import annotations

import logging
import os
import socket
from array import array
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Condition
from typing import TYPE_CHECKING

from pipeline.errors import Interrupted, JobError
from pipeline.report import Report
from pipeline.run.worker import Failed, Logged

if TYPE_CHECKING:
    from pipeline.job.job import Job
    from pipeline.output.rows import Row
    from pipeline.run.answering import Answering
    from pipeline.run.engine import Engine
    from pipeline.run.task import DocumentTask
    from turboquant.io.identity import Identity

_MOST_LINES = 1000  # of the log that are kept until the next answer


@dataclass(frozen=True)
class Ready:
    """A worker is: where it is and its log, the name of its store, and what it computes on."""

    host: str
    pid: int
    log: str
    store: str
    device: str


@dataclass(frozen=True)
class Outcome:
    """What became of one document: its rows by query id, what was read of it, and the segments that are its alone."""

    rows: Mapping[str, Row]
    truncated: bool
    split: bool
    keys: set[str]


@dataclass(frozen=True)
class Told:
    """What a worker says: that it is ready, what became of a lease, what it failed at, or that it left a lease alone.

    report: all that it did so far. lines: of the log, since it last said something.
    """

    report: Report
    lines: Sequence[Logged]
    ready: Ready | None = None
    outcomes: Sequence[Outcome] | None = None
    failed: Failed | None = None


class RayWorker:
    """Answers leases one after the other; the next is made ready meanwhile. Its methods are called by several threads.

    What MLX computes, it computes in one thread.
    """

    def __init__(self, job: Job, log_level: int) -> None:
        from turboquant.runtime.blas import load_tuned_blas

        self._blas = load_tuned_blas()
        self._job = job
        self._lines = _Lines()
        self._report = Report()
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._turns, self._turn = Condition(), 0
        self._queued: dict[int, Future[Sequence[Outcome] | None]] = {}
        self._is_stopping = False
        self._engine: Engine | None = None
        self._answering: Answering | None = None
        for handler in (self._lines, logging.StreamHandler()):
            logging.getLogger().addHandler(handler)
        logging.getLogger("pipeline").setLevel(log_level)

    def start(self, identity: Identity, versions: Mapping[str, str], schemas: Collection[str]) -> Told:
        """Load the model, if it and the packages are the same as where the run was started."""
        try:
            ready = self._model.submit(self._start, identity, versions, schemas).result()
            return self._told(ready=ready)
        except Exception as error:
            return self._told(failed=Failed.of(error))

    def answer(self, number: int, group: Sequence[DocumentTask]) -> Told:
        """Answer the lease of that number, as this worker's leases are counted, when those before it are."""
        try:
            self._queue(number, group)
            return self._told(outcomes=self._queued[number].result())
        except CancelledError:
            return self._told()
        except Exception as error:
            return self._told(failed=Failed.of(error))
        finally:
            self._queued.pop(number, None)

    def leave(self, number: int) -> None:
        """Do not begin with the lease of that number, if it waits."""
        if number in self._queued:
            self._queued[number].cancel()

    def stop(self) -> None:
        """Begin with nothing more."""
        self._is_stopping = True

    def stored(self) -> bytes:
        """The contexts of the job's kind that are in the store, as an array of their labels' numbers."""
        from pipeline.cache.hit_index import label_number

        assert self._engine is not None
        contexts = self._engine.store.contexts(self._identity)
        return array("Q", (label_number(label) for label, _ in contexts)).tobytes()

    def drop(self, keys: set[str] | None) -> None:
        """Remove segments that the job has built, all unless ``keys`` are given."""
        from pipeline.cache.pins import Pins
        from pipeline.cache.store import open_store
        from pipeline.run.executor import drop_segments

        others = Pins(self._job.cache.dir, self._job.result_file)  # what the job itself needs, its driver knows
        drop_segments(open_store(self._job.cache, others.is_pinned), self._job, keys)

    def _start(self, identity: Identity, versions: Mapping[str, str], schemas: Collection[str]) -> Ready:
        from pipeline.cache.pins import Pins
        from pipeline.cache.store import open_store
        from pipeline.inputs.prompts import Renderer
        from pipeline.progress import Progress
        from pipeline.run.answering import Answering
        from pipeline.run.engine import Engine
        from turboquant.runtime.device import on_cpu

        self._check(identity, versions)
        job, progress = self._job, Progress(0, quiet=True)
        store = open_store(job.cache, Pins(job.cache.dir).is_pinned)
        shared = Renderer(job.prompt).shared
        self._identity = identity
        self._engine = Engine(job, identity, store, shared, schemas, progress, self._report, self._check_stop)
        self._answering = Answering(self._engine, job.retries, progress, self._report, self._check_stop)
        device = f"a CPU, {self._blas.threads} threads" if on_cpu() else "a GPU"
        return Ready(socket.gethostname(), os.getpid(), _log_file(), store.folder_id(), device)

    def _queue(self, number: int, group: Sequence[DocumentTask]) -> None:
        """Make a lease ready, and have it answered in its turn: whoever hands them out must know which is at work."""
        assert self._engine is not None
        with self._turns:
            self._turns.wait_for(lambda: self._turn == number)
            try:
                for todo in group:
                    self._engine.make_ready(todo)
                self._queued[number] = self._model.submit(self._answer, group)
            finally:
                self._turn += 1
                self._turns.notify_all()

    def _check(self, identity: Identity, wanted: Mapping[str, str]) -> None:
        from pipeline.output.run_file import versions
        from pipeline.run.fingerprint import job_identity

        for name, version in versions().items():
            if version != wanted[name]:
                raise JobError(
                    f"{name} is {version} here and {wanted[name]} where the run was started; answers must not depend "
                    "on the machine, so install the same on all"
                )
        own = asdict(job_identity(self._job))
        for name, value in asdict(identity).items():
            if own[name] != value:
                raise JobError(
                    f"model {self._job.model}: its {name} here and where the run was started are not the same; answers "
                    "must not depend on the machine, so copy the model's folder"
                )

    def _answer(self, group: Sequence[DocumentTask]) -> Sequence[Outcome] | None:
        assert self._engine is not None
        assert self._answering is not None
        try:
            self._check_stop()
            self._answering.answer(group)
        except Interrupted:
            return None
        keys = [self._engine.own_keys(todo) if self._job.cache.keep == "job" else set() for todo in group]
        return [Outcome(todo.rows, todo.truncated, todo.split, own) for todo, own in zip(group, keys, strict=True)]

    def _check_stop(self) -> None:
        if self._is_stopping:
            raise Interrupted("interrupted")

    def _told(
        self, ready: Ready | None = None, outcomes: Sequence[Outcome] | None = None, failed: Failed | None = None
    ) -> Told:
        return Told(self._report.copy(), self._lines.taken(), ready, outcomes, failed)


class _Lines(logging.Handler):
    """Keeps what is logged until it is told."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: deque[Logged] = deque(maxlen=_MOST_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(Logged(record.name, record.levelno, self.format(record)))

    def taken(self) -> list[Logged]:
        """The lines since this was last asked."""
        return [self._kept.popleft() for _ in range(len(self._kept))]


def _log_file() -> str:
    """Where Ray has this process's stderr written, where the kernel tells."""
    file = Path("/proc/self/fd/2")
    return os.readlink(file) if file.exists() else ""
