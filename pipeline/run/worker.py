"""The process that runs the model: it does a whole run, and tells its parent how the run goes on.

Knows the messages and how to end with its parent. It does not know what the parent shows or decides. The parent
imports this module too, so what is heavy is imported by the function that needs it.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError, one_line
from pipeline.job.shards import Shard
from pipeline.report import Report
from pipeline.retry import OnFailure
from pipeline.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from pipeline.job.job import Job

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Task:
    """What the process is to do: a job, the report to go on from, and the arguments of the run."""

    job: Job
    report: Report
    condemned: Mapping[str, str]
    alone: Collection[str]
    on_failure: OnFailure
    shard: Shard | None
    log_level: int


@dataclass(frozen=True)
class RunStarted:
    """The job and its inputs are in order, and the result is this run's alone."""

    rows: int


@dataclass(frozen=True)
class DocumentsStarted:
    """The model begins on documents, whose work it does together."""

    document_ids: tuple[str, ...]


@dataclass(frozen=True)
class DocumentsDone:
    """The rows of documents are committed, and the report covers them."""

    document_ids: tuple[str, ...]
    report: Report


@dataclass(frozen=True)
class RowsDone:
    """So many more rows are answered, failed or were done before."""

    count: int


@dataclass(frozen=True)
class PrefillStarted:
    """A document's prefill begins."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Prefilled:
    """So many more tokens are prefilled."""

    tokens: int


@dataclass(frozen=True)
class PrefillEnded:
    """A document's prefill is over, well or not."""


@dataclass(frozen=True)
class Logged:
    """A line of the log."""

    logger: str
    level: int
    text: str


@dataclass(frozen=True)
class Finished:
    """The run came to its end, or was interrupted. The last message."""

    report: Report


@dataclass(frozen=True)
class Failed:
    """The run raised: a class of errors.py by name, its message, and where. The last message."""

    error: str
    message: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Failed:
        """What an exception says, to be called where it is handled."""
        if isinstance(error, PipelineError):
            return cls(type(error).__name__, str(error), traceback.format_exc())
        message = f"{type(error).__name__}: {one_line(error)} (--debug shows where)"
        return cls(PipelineError.__name__, message, traceback.format_exc())


Message = (
    RunStarted
    | DocumentsStarted
    | DocumentsDone
    | RowsDone
    | PrefillStarted
    | Prefilled
    | PrefillEnded
    | Logged
    | Finished
    | Failed
)


def work(connection: Connection, task: Task) -> None:
    """Do a run from start to end, in a process of its own; the last message says how it ended.

    There is none where the run was stopped at once: the parent knows what it asked for. STOP_SIGNALS are blocked when
    the process starts, so that none is lost before there is somebody to heed it.
    """
    _leave_the_terminal()
    end_with_the_parent()
    outbox = _Outbox(connection)
    _log_to(outbox, task.log_level)
    try:
        _handle_stop_signals(_stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        outcome = _outcome(outbox, task)
        _handle_stop_signals(signal.SIG_IGN)
        outbox.send(outcome)
    except KeyboardInterrupt:
        return


def _stop(number: int, frame: Any) -> None:
    _handle_stop_signals(signal.SIG_IGN)  # once will do: a second would cut off the tidying up
    raise KeyboardInterrupt


def _handle_stop_signals(handler: Callable[[int, Any], None] | signal.Handlers) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def _outcome(outbox: _Outbox, task: Task) -> Finished | Failed:
    try:
        from turboquant.runtime.blas import load_tuned_blas

        load_tuned_blas()

        from pipeline.models.ranks import leading_ranks
        from pipeline.run.runner import Runner

        runner = Runner(
            task.job,
            watch=partial(MessageObserver, outbox.send),
            report=task.report,
            condemned=task.condemned,
            alone=task.alone,
            on_failure=task.on_failure,
            shard=task.shard,
        )
        with leading_ranks(task.job):
            return Finished(runner.run())
    except Exception as error:
        return Failed.of(error)


def _leave_the_terminal() -> None:
    """A session of its own, so that Ctrl-C reaches the parent alone, which passes it on."""
    os.setsid()


def end_with_the_parent() -> None:
    """End at once when the parent does, however it does: the lock on the result is in the next run's way."""
    if sys.platform == "linux":  # where the kernel sees to it even while a library holds the GIL
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="watch the parent", daemon=True).start()


def _log_to(outbox: _Outbox, level: int) -> None:
    logging.getLogger().addHandler(_LogHandler(outbox))
    logging.getLogger("pipeline").setLevel(level)


class _Outbox:
    """Sends messages whole and in order, from any thread and from within a signal handler.

    Who finds the lock taken leaves the message to its holder, so nobody waits for a lock that it holds itself.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[Message] = deque()
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send a message; blocks while the parent is slow, and ends the process where there is no parent."""
        self._waiting.append(message)
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    self._connection.send(self._waiting.popleft())
            except BrokenPipeError:
                os._exit(1)
            finally:
                self._lock.release()


class _LogHandler(logging.Handler):
    def __init__(self, outbox: _Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        self._outbox.send(Logged(record.name, record.levelno, self.format(record)))


class MessageObserver:
    """Tells the parent how the run goes on."""

    def __init__(self, send: Callable[[Message], None], rows: int) -> None:
        self._send, self._rows = send, rows

    def __enter__(self) -> MessageObserver:
        self._send(RunStarted(self._rows))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def start_documents(self, document_ids: Sequence[str]) -> None:
        """These are begun with."""
        self._send(DocumentsStarted(tuple(document_ids)))

    def end_documents(self, document_ids: Sequence[str], report: Report) -> None:
        """Their rows are committed, and the report covers them."""
        self._send(DocumentsDone(tuple(document_ids), report))

    def rows_done(self, count: int) -> None:
        """So many more rows are done."""
        self._send(RowsDone(count))

    def start_prefill(self, name: str, tokens: int) -> None:
        """A document's prefill begins."""
        self._send(PrefillStarted(name, tokens))

    def prefilled(self, tokens: int) -> None:
        """So many more tokens are."""
        self._send(Prefilled(tokens))

    def end_prefill(self) -> None:
        """It is over, well or not."""
        self._send(PrefillEnded())
