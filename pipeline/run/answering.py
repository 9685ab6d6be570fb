"""Answers groups of documents with one engine: a group in, its rows out.

Knows the order of things and what becomes of a document when one fails; how each thing is done is the engine's. It
does not know where a group comes from, or what becomes of its rows: so it is the same in a run's own process and on a
machine that is handed groups by another.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.errors import GenerationFailed, RowError
from pipeline.progress import RunObserver
from pipeline.report import Report
from pipeline.retry import retried
from pipeline.run.task import DocumentTask

if TYPE_CHECKING:
    from pipeline.run.engine import Engine
    from turboquant import Prefix

_log = logging.getLogger(__name__)


class Answering:
    """Answers what is left of groups, one after the other. ``retries``: how often what fails is tried again.

    ``check`` raises Interrupted where the user asked to stop.
    """

    def __init__(
        self, engine: Engine, retries: int, progress: RunObserver, report: Report, check: Callable[[], None]
    ) -> None:
        self._engine, self._retries = engine, retries
        self._progress, self._report, self._check = progress, report, check
        self._shown = 0  # rows in hand that the progress counts already

    def answer(self, group: Sequence[DocumentTask]) -> None:
        """All that is left of a group becomes rows. Raises Interrupted, and DiskFull where there is no room."""
        self._answer_together(group, self._answered)
        self._engine.settle()
        self._progress.rows_done(sum(len(todo.rows) for todo in group) - self._shown)
        self._shown = 0

    def _answer_together(self, todos: Sequence[DocumentTask], on_answer: Callable[[], None]) -> None:
        found = [(todo, self._prefix(todo)) for todo in todos if todo.open]
        if ready := [(todo, prefix) for todo, prefix in found if prefix is not None]:
            self._answer(ready, on_answer)

    def _answer_windows(self, todo: DocumentTask) -> None:
        """Answer window by window what is asked of a document, and then once more from those answers."""
        for window in todo.windows:
            self._answer_together([window], lambda: None)
        todo.combined = self._engine.combine(todo)
        self._answer_together(todo.combined, self._answered)
        todo.conclude()

    def _prefix(self, todo: DocumentTask) -> Prefix | None:
        """The prefix of a document, if it has one; what is read in windows is answered by the way."""
        self._progress.start_documents([todo.document_id])
        self._engine.make_ready(todo)
        if todo.windows:
            self._answer_windows(todo)
        if not todo.open:
            return None
        try:
            return retried(lambda: self._engine.prefix(todo), self._retries, self._check)
        except RowError as error:
            todo.fail(error)
            return None

    def _answer(self, ready: Sequence[tuple[DocumentTask, Prefix]], on_answer: Callable[[], None]) -> None:
        self._progress.start_documents(list(dict.fromkeys(todo.document_id for todo, _ in ready)))
        try:
            retried(lambda: self._attempt(ready, on_answer), self._retries, self._check)
        except GenerationFailed as error:
            if len(ready) == 1:
                ready[0][0].fail(error)
                return
            _log.warning("answering %d documents together failed, so each is tried by itself: %s", len(ready), error)
            for one in ready:
                self._answer([one], on_answer)

    def _attempt(self, ready: Sequence[tuple[DocumentTask, Prefix]], on_answer: Callable[[], None]) -> None:
        shown = self._shown
        try:
            with _timed(self._report, "answer_seconds"):
                self._engine.answer(ready, on_answer)
        except GenerationFailed:
            self._progress.rows_done(shown - self._shown)
            self._shown = shown
            raise

    def _answered(self) -> None:
        self._shown += 1
        self._progress.rows_done(1)


@contextmanager
def _timed(report: Report, name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        setattr(report, name, getattr(report, name) + time.monotonic() - started)
