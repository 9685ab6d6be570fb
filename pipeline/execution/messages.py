"""Messages from the model's process to its parent, and how they are sent.

The parent imports this module, so it imports nothing heavy.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

from pipeline import errors
from pipeline.errors import PipelineError, one_line
from pipeline.execution.context import RunOptions
from pipeline.execution.finished_documents import FinishedDocuments
from pipeline.job.shards import Shard
from pipeline.progress import RunObserver
from pipeline.report import Report

if TYPE_CHECKING:
    from pipeline.job.job import Job

SECONDS_BETWEEN_POLLS = 1.0


@dataclass(frozen=True)
class RunRequest:
    """The job that the process runs: the arguments of Runner, and the level of its log."""

    job: Job
    report: Report
    finished: FinishedDocuments
    quarantined: Mapping[str, str]
    separated: Collection[str]
    options: RunOptions
    shard: Shard | None
    log_level: int


@dataclass(frozen=True)
class RunStarted:
    """The job and its inputs are valid, and the process holds the lock of the result."""

    rows: int


@dataclass(frozen=True)
class DocumentsStarted:
    """The model starts to work on these documents together."""

    document_ids: tuple[str, ...]


@dataclass(frozen=True)
class DocumentsDone:
    """The rows of these documents are on disk, and the report counts them."""

    document_ids: tuple[str, ...]
    report: Report


@dataclass(frozen=True)
class RowsDone:
    """``count`` more rows are answered, failed or kept."""

    count: int


@dataclass(frozen=True)
class PrefillStarted:
    """The prefill of ``tokens`` tokens of a document starts."""

    document_id: str
    tokens: int


@dataclass(frozen=True)
class PrefillAdvanced:
    """``tokens`` more tokens are prefilled."""

    tokens: int


@dataclass(frozen=True)
class PrefillEnded:
    """The prefill is over, whether it succeeded or not."""


@dataclass(frozen=True)
class RestoreAdvanced:
    """``tokens`` more tokens are restored from the store."""

    tokens: int


@dataclass(frozen=True)
class Logged:
    """A line of the log."""

    logger: str
    level: int
    text: str


@dataclass(frozen=True)
class Finished:
    """The run finished or was interrupted. This is the last message."""

    report: Report


@dataclass(frozen=True)
class Failed:
    """The run raised an exception: a class of errors.py by its name, the message, and the traceback.

    This is the last message.
    """

    error: str
    message: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Failed:
        """Describe an exception. Call this where the exception is handled."""
        if isinstance(error, PipelineError):
            return cls(type(error).__name__, str(error), traceback.format_exc())
        message = f"{type(error).__name__}: {one_line(error)} (--debug shows where)"
        return cls(PipelineError.__name__, message, traceback.format_exc())

    def reraise(self) -> NoReturn:
        """Raise the exception in this process."""
        error: PipelineError = getattr(errors, self.error)(self.message)
        raise error from RemoteTraceback(f"\n{self.trace}")


class RemoteTraceback(Exception):
    """The traceback of an exception in another process; it is shown above this process's own."""


Message = (
    RunStarted
    | DocumentsStarted
    | DocumentsDone
    | RowsDone
    | PrefillStarted
    | PrefillAdvanced
    | PrefillEnded
    | RestoreAdvanced
    | Logged
    | Finished
    | Failed
)


class MessageObserver(RunObserver):
    """Sends the events of a run as messages."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send

    def run_started(self, rows: int) -> None:
        """Send RunStarted."""
        self._send(RunStarted(rows))

    def documents_started(self, document_ids: Sequence[str]) -> None:
        """Send DocumentsStarted."""
        self._send(DocumentsStarted(tuple(document_ids)))

    def documents_done(self, document_ids: Sequence[str], report: Report) -> None:
        """Send DocumentsDone."""
        self._send(DocumentsDone(tuple(document_ids), report))

    def rows_done(self, count: int) -> None:
        """Send RowsDone."""
        self._send(RowsDone(count))

    def prefill_started(self, document_id: str, tokens: int) -> None:
        """Send PrefillStarted."""
        self._send(PrefillStarted(document_id, tokens))

    def prefill_advanced(self, tokens: int) -> None:
        """Send PrefillAdvanced."""
        self._send(PrefillAdvanced(tokens))

    def prefill_ended(self) -> None:
        """Send PrefillEnded."""
        self._send(PrefillEnded())

    def restore_advanced(self, tokens: int) -> None:
        """Send RestoreAdvanced."""
        self._send(RestoreAdvanced(tokens))


class Outbox:
    """Sends messages whole and in order, from any thread and from within a signal handler.

    A sender that finds the lock taken leaves its message to the holder of the lock, so a signal handler never waits for
    a lock that its own thread holds.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[Message] = deque()
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send a message. This blocks while the parent is slow, and ends the process if the parent is gone."""
        self._waiting.append(message)
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    self._connection.send(self._waiting.popleft())
            except BrokenPipeError:
                os._exit(1)
            finally:
                self._lock.release()


class MessageLogHandler(logging.Handler):
    """Sends log records as messages."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send Logged."""
        self._send(Logged(record.name, record.levelno, self.format(record)))


def receive(connection: Connection, while_waiting: Callable[[], None] = lambda: None) -> Message | None:
    """Return the next message, or None if the sender is gone. ``while_waiting`` is called every second until then."""
    try:
        while not connection.poll(SECONDS_BETWEEN_POLLS):
            while_waiting()
        message: Message = connection.recv()
    except (EOFError, OSError):  # OSError: the sender died in the middle of a message
        return None
    return message
