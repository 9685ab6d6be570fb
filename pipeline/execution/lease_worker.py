"""A worker of a run: a process with a model of its own that answers leases.

The process that hands out the leases imports this module too, so heavy imports are inside the methods that need them.
"""

from __future__ import annotations

import logging
import os
import socket
from array import array
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Condition, Lock
from typing import TYPE_CHECKING

from pipeline.errors import Interrupted, JobError
from pipeline.execution.messages import Failed, Logged, MessageLogHandler
from pipeline.progress import RunObserver
from pipeline.report import WorkStats

if TYPE_CHECKING:
    from pipeline.execution.engine import Engine
    from pipeline.execution.prepared import PreparedTask
    from pipeline.execution.task import DocumentTask, TaskResult
    from pipeline.job.job import Job
    from turboquant.io.identity import Identity

_MOST_LINES = 1000  # of the log that are kept until the next reply


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker is and its log, the name of its store, and the device it computes on."""

    host: str
    pid: int
    log: str
    store: str
    device: str


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of contexts that a worker has prefilled and restored since it started, and rows that it has answered.

    changes: how often they have changed; of two counts, the one with more is the later one.
    """

    prefilled: int = 0
    restored: int = 0
    rows: int = 0
    changes: int = 0


@dataclass(frozen=True)
class WorkerReply:
    """The reply of a worker to a call.

    stats: the work of a lease. lines: of the log since the last reply. tokens: of all leases so far. info: after
    ``start``. results: of a lease, one for each task; None if the lease was left alone. failed: the exception that the
    call raised.
    """

    stats: WorkStats
    lines: Sequence[Logged]
    tokens: TokenCounts
    info: WorkerInfo | None = None
    results: Sequence[TaskResult] | None = None
    failed: Failed | None = None


class _TokenCounter(RunObserver):
    def __init__(self) -> None:
        self.counts = TokenCounts()
        self._lock = Lock()  # prefixes are restored in other threads

    def prefill_advanced(self, tokens: int) -> None:
        self._add(prefilled=tokens)

    def restore_advanced(self, tokens: int) -> None:
        self._add(restored=tokens)

    def rows_done(self, count: int) -> None:
        self._add(rows=count)

    def _add(self, prefilled: int = 0, restored: int = 0, rows: int = 0) -> None:
        with self._lock:
            now = self.counts
            self.counts = TokenCounts(
                now.prefilled + prefilled, now.restored + restored, now.rows + rows, now.changes + 1
            )


class LeaseWorker:
    """Answers leases one after the other, while the next lease is prepared. Its methods are called in several threads.

    All computations of MLX run in one thread. logs_to_stderr: whether stderr is the log of this worker.
    """

    def __init__(self, job: Job, log_level: int, logs_to_stderr: bool = True) -> None:
        from turboquant.runtime.blas import load_tuned_blas

        self._blas = load_tuned_blas()
        self._job = job
        self._lines: deque[Logged] = deque(maxlen=_MOST_LINES)
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._turns, self._turn = Condition(), 0
        self._queued: dict[int, Future[tuple[Sequence[TaskResult] | None, WorkStats]]] = {}
        self._recalled: set[int] = set()
        self._is_stopping = False
        self._tokens = _TokenCounter()
        self._engine: Engine | None = None
        self._logs_to_stderr = logs_to_stderr
        logging.getLogger().addHandler(MessageLogHandler(self._keep_line))
        if logs_to_stderr:
            logging.getLogger().addHandler(logging.StreamHandler())
        logging.getLogger("pipeline").setLevel(log_level)

    def start(self, identity: Identity, versions: Mapping[str, str], schemas: Collection[str]) -> WorkerReply:
        """Load the model, if the model and the packages are the same as where the run was started."""
        try:
            return self._reply(info=self._model.submit(self._start, identity, versions, schemas).result())
        except Exception as error:
            return self._reply(failed=Failed.of(error))

    def answer(self, number: int, tasks: Sequence[DocumentTask]) -> WorkerReply:
        """Answer a lease, after all leases with smaller numbers. Numbers count this worker's leases from 0."""
        try:
            self._queue(number, tasks)
            results, stats = self._queued[number].result()
            return self._reply(results=results, stats=stats)
        except CancelledError:
            return self._reply()
        except Exception as error:
            return self._reply(failed=Failed.of(error))
        finally:
            self._queued.pop(number, None)

    def recall(self, number: int) -> None:
        """Do not start the lease of that number, if it still waits or is being prepared."""
        self._recalled.add(number)
        if (queued := self._queued.get(number)) is not None:
            queued.cancel()

    def stop(self) -> None:
        """Start no more leases."""
        self._is_stopping = True

    def token_counts(self) -> TokenCounts:
        """Return what is prefilled and restored so far, in leases that are not answered yet too."""
        return self._tokens.counts

    def stored_labels(self) -> bytes:
        """Return the labels of the job's contexts in the store, as an array of uint64 (see hit_index.py)."""
        from pipeline.cache.hit_index import label_number

        assert self._engine is not None
        contexts = self._engine.store.contexts(self._identity)
        return array("Q", (label_number(label) for label, _ in contexts)).tobytes()

    def drop(self, keys: Collection[str] | None) -> None:
        """Remove segments that the job has built: all of them, or those with the given keys."""
        from pipeline.cache.pins import Pins
        from pipeline.cache.store import open_store
        from pipeline.execution.executor import drop_segments

        other_jobs = Pins(self._job.cache.dir, self._job.result_file)  # the driver knows what this job still needs
        drop_segments(open_store(self._job.cache, other_jobs.is_pinned), self._job, keys)

    def _start(self, identity: Identity, versions: Mapping[str, str], schemas: Collection[str]) -> WorkerInfo:
        from pipeline.cache.pins import Pins
        from pipeline.cache.store import open_store
        from pipeline.execution.context import RunContext
        from pipeline.execution.engine import Engine
        from turboquant.runtime.device import on_cpu

        self._check_equal(identity, versions)
        self._identity = identity
        store = open_store(self._job.cache, Pins(self._job.cache.dir).is_pinned)
        self._engine = Engine(RunContext(self._job, identity, schemas, self._tokens, self._check_stop), store)
        device = f"a CPU, {self._blas.threads} threads" if on_cpu() else "a GPU"
        stderr = Path("/proc/self/fd/2")  # Ray has made it a file, whose name the kernel tells
        log = os.readlink(stderr) if self._logs_to_stderr and stderr.exists() else ""
        return WorkerInfo(socket.gethostname(), os.getpid(), log, store.folder_id(), device)

    def _check_equal(self, identity: Identity, driver_versions: Mapping[str, str]) -> None:
        from pipeline.execution.fingerprint import job_identity
        from turboquant.runtime.versions import package_versions

        for name, version in package_versions().items():
            if version != driver_versions[name]:
                raise JobError(
                    f"{name} is {version} here and {driver_versions[name]} where the run was started; answers must not "
                    "depend on the machine, so install the same on all"
                )
        own_identity = asdict(job_identity(self._job))
        for name, value in asdict(identity).items():
            if own_identity[name] != value:
                raise JobError(
                    f"model {self._job.model}: its {name} here and where the run was started are not the same; answers "
                    "must not depend on the machine, so copy the model's folder"
                )

    def _queue(self, number: int, tasks: Sequence[DocumentTask]) -> None:
        """Prepare a lease and queue it in its turn: the driver relies on the order of leases."""
        assert self._engine is not None
        with self._turns:
            self._turns.wait_for(lambda: self._turn == number)
            try:
                prepared = []
                for task in tasks:
                    if number in self._recalled:
                        raise CancelledError
                    prepared.append(self._engine.prepare(task))
                self._queued[number] = self._model.submit(self._answer, prepared)
                if number in self._recalled:  # since it was looked at last
                    self._queued[number].cancel()
            finally:
                self._turn += 1
                self._turns.notify_all()

    def _answer(self, prepared: Sequence[PreparedTask]) -> tuple[Sequence[TaskResult] | None, WorkStats]:
        """Answer a lease in the model's thread. Return its results, None if the worker shall stop, and the work."""
        assert self._engine is not None
        results = None
        with suppress(Interrupted):
            self._check_stop()
            results = self._engine.answer(prepared)
        return results, self._engine.take_stats()

    def _check_stop(self) -> None:
        if self._is_stopping:
            raise Interrupted("interrupted")

    def _keep_line(self, message: object) -> None:
        assert isinstance(message, Logged)
        self._lines.append(message)

    def _reply(
        self,
        info: WorkerInfo | None = None,
        results: Sequence[TaskResult] | None = None,
        stats: WorkStats | None = None,
        failed: Failed | None = None,
    ) -> WorkerReply:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        return WorkerReply(stats or WorkStats(), lines, self._tokens.counts, info, results, failed)
