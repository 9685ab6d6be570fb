"""What the user sees of the process that runs the model: its progress, over restarts, its log, and its numbers.

Knows the process's messages; nothing of when it is started or why it ends.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import OutputError
from pipeline.logs import are_json, tell
from pipeline.metrics import write_metrics
from pipeline.progress import Progress
from pipeline.run.worker import (
    DocumentsDone,
    Finished,
    Logged,
    Message,
    Prefilled,
    PrefillEnded,
    PrefillStarted,
    RowsDone,
    RunStarted,
)

SECONDS_BETWEEN_METRICS = 5.0
_log = logging.getLogger(__name__)


class RunDisplay:
    """Shows one run; a context, in which messages are shown as they come. ``metrics``: a file for its numbers.

    Raises OutputError on entering where that cannot be written; from then on a warning is all that comes of it.
    """

    def __init__(self, job: str, quiet: bool, metrics: Path | None) -> None:
        self._job, self._quiet, self._metrics = job, quiet, metrics
        self._progress = Progress(0, quiet=True)  # until it is known how many rows there are
        self._started = False
        self._open = ExitStack()
        self._last_metrics = 0.0
        self._rows_in_hand = 0  # shown as done, and not committed yet

    def __enter__(self) -> RunDisplay:
        self._write_metrics(running=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._try_to_write_metrics(running=False)

    def show(self, message: Message) -> None:
        """Show what a message says."""
        if isinstance(message, Logged):
            logging.getLogger(message.logger).log(message.level, "%s", message.text)
        elif isinstance(message, RunStarted):
            self._start(message.rows)
        elif isinstance(message, DocumentsDone):
            self._rows_in_hand = 0
            self._progress.end_documents(message.document_ids, message.report)
            self._tell_programs("documents done", document_ids=message.document_ids, **asdict(self._progress.pace()))
        elif isinstance(message, Finished):
            self._progress.end_documents((), message.report)
            self._tell_programs("run ended", **asdict(message.report))
        else:
            self._count(message)
        self.refresh()

    def refresh(self) -> None:
        """Show that time has passed, whatever has happened."""
        self._progress.refresh()
        if time.monotonic() - self._last_metrics >= SECONDS_BETWEEN_METRICS:
            self._try_to_write_metrics(running=True)

    def forget_rows_in_hand(self) -> None:
        """The process died, so what it had in hand is to be done again."""
        self._progress.end_prefill()
        self._progress.rows_done(-self._rows_in_hand)
        self._rows_in_hand = 0

    def _start(self, rows: int) -> None:
        if not self._started:  # or the process is another one that goes on with the same run
            self._started = True
            self._progress = self._open.enter_context(Progress(rows, self._quiet))
            self._tell_programs("run started", rows=rows)

    def _count(self, message: Message) -> None:
        if isinstance(message, RowsDone):
            self._rows_in_hand += message.count
            self._progress.rows_done(message.count)
        elif isinstance(message, PrefillStarted):
            self._progress.start_prefill(message.name, message.tokens)
        elif isinstance(message, Prefilled):
            self._progress.prefilled(message.tokens)
        elif isinstance(message, PrefillEnded):
            self._progress.end_prefill()

    def _tell_programs(self, text: str, **fields: Any) -> None:
        if are_json() and not self._quiet:
            tell(text, logging.INFO, **fields)

    def _try_to_write_metrics(self, running: bool) -> None:
        try:
            self._write_metrics(running)
        except OutputError as error:
            _log.warning("%s; the run goes on without", error)
            self._metrics = None

    def _write_metrics(self, running: bool) -> None:
        self._last_metrics = time.monotonic()
        if self._metrics is not None:
            write_metrics(self._metrics, self._job, self._progress.pace(), self._progress.report, running)
