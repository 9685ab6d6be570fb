"""Progress of a run: the events of a run, and bars or lines that show them.

On a terminal there are bars. Elsewhere a run writes a line every half minute.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline.logs import are_json, tell
from pipeline.printable import printable
from pipeline.report import Report

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BEFORE_BAR = 1.0
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
_Item = TypeVar("_Item")


class RunObserver:
    """Receives the events of a run. This base class ignores them."""

    def run_started(self, rows: int) -> None:
        """The job and its inputs are valid, and this run holds the lock of the result. ``rows`` is the total."""

    def run_ended(self) -> None:
        """The run is over, whether it succeeded or not."""

    def documents_started(self, document_ids: Sequence[str]) -> None:
        """The model starts to work on these documents together."""

    def documents_done(self, document_ids: Sequence[str], report: Report) -> None:
        """The rows of these documents are on disk, and ``report`` counts them. Called from any thread."""

    def rows_done(self, count: int) -> None:
        """``count`` more rows are answered, failed or kept. It is negative if rows must be answered again."""

    def prefill_started(self, document_id: str, tokens: int) -> None:
        """The prefill of ``tokens`` tokens of a document starts."""

    def prefill_advanced(self, tokens: int) -> None:
        """``tokens`` more tokens are prefilled."""

    def prefill_ended(self) -> None:
        """The prefill is over, whether it succeeded or not."""

    def restore_advanced(self, tokens: int) -> None:
        """``tokens`` more tokens of contexts are restored from the store. Called from any thread."""


class Observers(RunObserver):
    """Passes each event on to several observers."""

    def __init__(self, *observers: RunObserver) -> None:
        self._observers = observers

    def run_started(self, rows: int) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.run_started(rows)

    def run_ended(self) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.run_ended()

    def documents_started(self, document_ids: Sequence[str]) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.documents_started(document_ids)

    def documents_done(self, document_ids: Sequence[str], report: Report) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.documents_done(document_ids, report)

    def rows_done(self, count: int) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.rows_done(count)

    def prefill_started(self, document_id: str, tokens: int) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.prefill_started(document_id, tokens)

    def prefill_advanced(self, tokens: int) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.prefill_advanced(tokens)

    def prefill_ended(self) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.prefill_ended()

    def restore_advanced(self, tokens: int) -> None:
        """Pass the event on."""
        for observer in self._observers:
            observer.restore_advanced(tokens)


@dataclass(frozen=True)
class Pace:
    """The state of a run at one moment. A value is None while it is not known.

    ``hit_rate`` is the share of prefixes that were in the store. ``rows_done`` includes rows that are not on disk yet.
    """

    seconds: float
    rows: int
    rows_done: int
    documents: int
    documents_done: int
    prefilled_tokens: int
    restored_tokens: int
    prefill_tokens_per_second: float | None
    answers_per_second: float | None
    hit_rate: float | None
    seconds_left: float | None

    def __str__(self) -> str:
        """Return a line for the log."""
        rows = f"{self.seconds:.0f} s: {self.rows_done:,} of {self.rows:,} rows"
        return ", ".join([rows, *self.details()])

    def details(self) -> list[str]:
        """Return everything but the rows, the most important first."""
        details = []
        if self.seconds_left is not None:
            details.append(f"{_duration(self.seconds_left)} left")
        if self.documents:
            details.append(f"{self.documents_done:,}/{self.documents:,} documents")
        if self.answers_per_second:
            details.append(f"{self.answers_per_second:.3g} answers/s")
        if self.hit_rate is not None:
            details.append(f"{self.hit_rate:.0%} hits")
        if self.restored_tokens:
            details.append(f"{self.restored_tokens:,} tokens restored")
        if self.prefill_tokens_per_second:
            details.append(f"prefill {self.prefill_tokens_per_second:,.0f} tokens/s")
        return details


@dataclass(frozen=True)
class _Committed:
    """The work that was done when documents were last committed. seconds: of work, without loading the model."""

    seconds: float
    prefill_seconds: float
    rows: int


class Progress(RunObserver):
    """A RunObserver that shows bars or lines on stderr. ``quiet`` shows nothing and still counts.

    report: of an earlier process of the same run, whose counts go on.
    """

    def __init__(self, quiet: bool = False, report: Report | None = None) -> None:
        self._quiet = quiet
        self.report = report.copy() if report else Report()  # counts the documents whose rows are on disk
        self._rows = self._restored = 0
        self._rows_done = self.report.rows_done
        self._tokens = self.report.prefilled_tokens
        self._prefill_seconds = self.report.prefill_seconds
        self._last_line = self._last_prefilled = time.monotonic()
        self._started = self._last_line - self.report.seconds
        self._bar: tqdm[Any] | None = None
        self._prefill_bar: tqdm[Any] | None = None
        self._begun_ids: set[str] = set()  # documents whose prefill has started, and that are not done
        self._begun = self._begun_tokens = 0  # all documents whose prefill has started, and their tokens
        self._tokens_in_hand: int | None = None  # those left of the prefill that is going on
        self._work_started: float | None = None  # the model was loaded before
        self._committed: _Committed | None = None
        self._log_redirection = ExitStack()

    def run_started(self, rows: int) -> None:
        """Show a bar of all rows."""
        self._rows = rows
        self._last_line = self._last_prefilled = time.monotonic()
        self._started = self._last_line - self.report.seconds
        if not self._quiet and _can_show_bars() and not are_json():
            self._bar = tqdm(total=rows, desc="rows", unit="row", dynamic_ncols=True, bar_format=_BAR)
            self._log_redirection.enter_context(logging_redirect_tqdm())  # or log lines would break the bars

    def run_ended(self) -> None:
        """Remove the bars."""
        self.prefill_ended()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._log_redirection.close()

    def documents_done(self, document_ids: Sequence[str], report: Report) -> None:
        """Take over the report's counts."""
        self.report = report
        self._begun_ids.difference_update(document_ids)
        now = time.monotonic()
        self._committed = _Committed(
            now - (self._started if self._work_started is None else self._work_started),
            self._prefill_seconds,
            self._rows_done - report.rows_found,
        )
        self.refresh()

    def rows_done(self, count: int) -> None:
        """Count rows."""
        self._rows_done += count
        if self._bar is not None:
            self._bar.update(count)
        self.refresh()

    def prefill_started(self, document_id: str, tokens: int) -> None:
        """Show a bar for one prefill."""
        self._last_prefilled = time.monotonic()
        self._work_started = self._work_started or self._last_prefilled
        self._begun += document_id not in self._begun_ids
        self._begun_ids.add(document_id)
        self._begun_tokens += tokens
        self._tokens_in_hand = tokens
        if self._bar is not None:
            self._prefill_bar = tqdm(
                total=tokens,
                desc=f"prefill {printable(document_id)}",
                unit="token",
                leave=False,
                position=1,
                dynamic_ncols=True,
            )

    def prefill_advanced(self, tokens: int) -> None:
        """Count prefilled tokens."""
        self._tokens += tokens
        self._tokens_in_hand = max(0, (self._tokens_in_hand or 0) - tokens)
        self._count_prefill_seconds()
        if self._prefill_bar is not None:
            self._prefill_bar.update(tokens)
        self.refresh()

    def prefill_ended(self) -> None:
        """Count the time of compression, which follows the last tokens, and remove the bar of the prefill."""
        if self._tokens_in_hand is not None:
            self._count_prefill_seconds()
            self._tokens_in_hand = None
        if self._prefill_bar is not None:
            self._prefill_bar.close()
        self._prefill_bar = None

    def _count_prefill_seconds(self) -> None:
        now = time.monotonic()
        self._prefill_seconds += now - self._last_prefilled
        self._last_prefilled = now

    def restore_advanced(self, tokens: int) -> None:
        """Count restored tokens."""
        self._work_started = self._work_started or time.monotonic()
        self._restored += tokens
        self.refresh()

    def pace(self) -> Pace:
        """Return the state of the run now."""
        seconds, report = time.monotonic() - self._started, self.report
        prefixes = report.prefixes_built + report.prefixes_restored
        rate = max(0, self._rows_done - report.rows_found) / seconds if seconds else 0.0
        return Pace(
            seconds=seconds,
            rows=self._rows,
            rows_done=self._rows_done,
            documents=report.documents,
            documents_done=report.documents_done,
            prefilled_tokens=self._tokens,
            restored_tokens=self._restored,
            prefill_tokens_per_second=self._tokens / self._prefill_seconds if self._prefill_seconds else None,
            answers_per_second=rate or None,
            hit_rate=report.prefixes_restored / prefixes if prefixes else None,
            seconds_left=self._seconds_left(),
        )

    def _seconds_left(self) -> float | None:
        """Return how long the rest will take, if it is like what is done; None before the second document has started.

        The first one alone may be far shorter or longer than the others.

        Answers and prefill are estimated apart, by the speed of each. A document's prefill comes before all of its
        answers, so rows per second would rise and fall with each document.
        """
        done, report = self._committed, self.report
        if done is None or done.rows <= 0 or (self._begun == 1 and report.documents_done < min(2, report.documents)):
            return None
        seconds = (self._rows - self._rows_done) * max(0.0, done.seconds - done.prefill_seconds) / done.rows
        if not self._tokens or not self._prefill_seconds:
            return seconds
        built = report.prefixes_built / max(1, report.prefixes_built + report.prefixes_restored)
        average = self._begun_tokens / self._begun if self._begun else self._tokens / max(1, report.prefixes_built)
        to_begin = max(0, report.documents - report.documents_done - len(self._begun_ids))
        left = (self._tokens_in_hand or 0) + to_begin * built * average
        return seconds + left * self._prefill_seconds / self._tokens

    def refresh(self) -> None:
        """Update the bar, or write a line if half a minute has passed since the last one."""
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self.pace().details()), refresh=False)
            self._bar.update(0)
            return
        now = time.monotonic()
        if not self._quiet and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            pace = self.pace()
            tell(str(pace), logging.INFO, **asdict(pace))


def with_progress_bar(items: Iterable[_Item], count: int, quiet: bool = False) -> Iterator[_Item]:
    """Yield the items and show a bar on a terminal if they take longer than a second."""
    yield from tqdm(
        items,
        total=count,
        desc="documents",
        unit="doc",
        leave=False,
        delay=SECONDS_BEFORE_BAR,
        dynamic_ncols=True,
        disable=quiet or not _can_show_bars(),
    )


def _can_show_bars() -> bool:
    """Return whether there is a terminal or a notebook, whose bars tqdm shows by a class of its own."""
    return sys.stderr.isatty() or any(each.__module__ == "tqdm.notebook" for each in tqdm.__mro__)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
