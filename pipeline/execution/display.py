"""Shows a run to the user: its progress over restarts of the model's process, its log, and its metrics file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import OutputError
from pipeline.execution.messages import (
    DocumentsDone,
    Finished,
    Logged,
    Message,
    PrefillAdvanced,
    PrefillEnded,
    PrefillStarted,
    RestoreAdvanced,
    RowsDone,
    RunStarted,
)
from pipeline.logs import are_json, tell
from pipeline.metrics import write_metrics
from pipeline.progress import Pace, Progress

SECONDS_BETWEEN_METRICS = 5.0
SECONDS_BETWEEN_PACES = 0.2
_log = logging.getLogger(__name__)


class RunDisplay:
    """Shows the messages of one run; used as a context manager. metrics: a file for the run's numbers.
    on_progress: receives them several times a second at most.

    Raises OutputError on entering if that file cannot be written; later failures only log a warning.
    """

    def __init__(
        self, job: str, quiet: bool, metrics: Path | None, on_progress: Callable[[Pace], None] | None = None
    ) -> None:
        self._job, self._quiet, self._metrics, self._on_progress = job, quiet, metrics, on_progress
        self._progress = Progress(quiet=True)  # until the number of rows is known
        self._started = False
        self._last_metrics = self._last_told = 0.0

    def __enter__(self) -> RunDisplay:
        self._write_metrics(running=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.run_ended()
        self._try_to_write_metrics(running=False)

    def show(self, message: Message) -> None:
        """Show a message."""
        progress = self._progress
        if isinstance(message, Logged):
            logging.getLogger(message.logger).log(message.level, "%s", message.text)
        elif isinstance(message, RunStarted):
            if not self._started:  # otherwise a new process goes on with the same run
                self._started = True
                self._progress = Progress(self._quiet)
                self._progress.run_started(message.rows)
                self._tell_programs("run started", rows=message.rows)
        elif isinstance(message, DocumentsDone):
            progress.documents_done(message.document_ids, message.report)
            self._last_told = 0.0  # each of them is told
            self._tell_programs("documents done", document_ids=message.document_ids, **asdict(progress.pace()))
        elif isinstance(message, Finished):
            progress.documents_done((), message.report)
            self._last_told = 0.0  # so that the end is told
            self._tell_programs("run ended", **asdict(message.report))
        elif isinstance(message, RowsDone):
            progress.rows_done(message.count)
        else:
            _show_tokens(progress, message)
        self.refresh()

    def refresh(self) -> None:
        """Update progress and metrics. Call this from time to time, also if nothing happened."""
        self._progress.refresh()
        if self._on_progress and time.monotonic() - self._last_told >= SECONDS_BETWEEN_PACES:
            self._last_told = time.monotonic()
            self._on_progress(self._progress.pace())
        if time.monotonic() - self._last_metrics >= SECONDS_BETWEEN_METRICS:
            self._try_to_write_metrics(running=True)

    def forget_rows_in_hand(self) -> None:
        """Take back the rows that were not on disk when the process died."""
        self._progress.prefill_ended()
        self._progress.rows_done(self._progress.report.rows_done - self._progress.pace().rows_done)

    def _tell_programs(self, text: str, **fields: Any) -> None:
        if are_json() and not self._quiet:
            tell(text, logging.INFO, **fields)

    def _try_to_write_metrics(self, running: bool) -> None:
        try:
            self._write_metrics(running)
        except OutputError as error:
            _log.warning("%s; the run goes on without metrics", error)
            self._metrics = None

    def _write_metrics(self, running: bool) -> None:
        self._last_metrics = time.monotonic()
        if self._metrics is not None:
            write_metrics(self._metrics, self._job, self._progress.pace(), self._progress.report, running)


def _show_tokens(progress: Progress, message: Message) -> None:
    if isinstance(message, PrefillStarted):
        progress.prefill_started(message.document_id, message.tokens)
    elif isinstance(message, PrefillAdvanced):
        progress.prefill_advanced(message.tokens)
    elif isinstance(message, PrefillEnded):
        progress.prefill_ended()
    elif isinstance(message, RestoreAdvanced):
        progress.restore_advanced(message.tokens)
