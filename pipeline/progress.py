"""How far a command is: bars on a terminal, for a run a line every half minute elsewhere.

Knows counts and a clock; nothing of what is counted, nor which process counts.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, Protocol, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline.logs import are_json, tell
from pipeline.pace import Pace
from pipeline.printable import printable
from pipeline.report import Report

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BEFORE_BAR = 1.0
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


_Item = TypeVar("_Item")


def watched(items: Iterable[_Item], count: int, quiet: bool = False) -> Iterator[_Item]:
    """The items, with a bar on a terminal once they take more than a moment."""
    hidden = quiet or not sys.stderr.isatty()
    yield from tqdm(
        items,
        total=count,
        desc="documents",
        unit="doc",
        leave=False,
        delay=SECONDS_BEFORE_BAR,
        dynamic_ncols=True,
        disable=hidden,
    )


class RunObserver(Protocol):
    """Who is told how a run goes on."""

    def start_documents(self, document_ids: Sequence[str]) -> None:
        """The model begins on documents, whose work it does together."""

    def end_documents(self, document_ids: Sequence[str], report: Report) -> None:
        """Documents are done and committed; the report covers them. Called from any thread."""

    def rows_done(self, count: int) -> None:
        """So many more rows are answered, failed or were done before."""

    def start_prefill(self, name: str, tokens: int) -> None:
        """A document's prefill begins."""

    def prefilled(self, tokens: int) -> None:
        """So many more tokens are prefilled."""

    def end_prefill(self) -> None:
        """A document's prefill is over, well or not."""


class Progress:
    """Counts rows done and tokens prefilled of one run; use as a context manager. ``quiet`` shows nothing."""

    def __init__(self, rows: int, quiet: bool = False) -> None:
        self._rows, self._rows_done, self._tokens = rows, 0, 0
        self.report = Report()  # of the documents done
        self._quiet = quiet
        self._started = self._last_line = self._last_prefilled = time.monotonic()
        self._prefill_seconds = 0.0
        self._bar: tqdm[Any] | None = None
        self._prefill: tqdm[Any] | None = None
        self._logs = ExitStack()

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty() and not are_json():
            self._bar = tqdm(total=self._rows, desc="rows", unit="row", dynamic_ncols=True, bar_format=_BAR)
            self._logs.enter_context(logging_redirect_tqdm())  # or log lines would run into the bars
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_prefill()
        if self._bar is not None:
            self._bar.close()
        self._logs.close()

    def pace(self) -> Pace:
        """How far the run is now."""
        seconds, prefilled = time.monotonic() - self._started, (self._tokens, self._prefill_seconds)
        return Pace.of(seconds, self._rows, self._rows_done, prefilled, self.report)

    def start_documents(self, document_ids: Sequence[str]) -> None:
        """Show nothing: a document's bar is its prefill's."""

    def end_documents(self, document_ids: Sequence[str], report: Report) -> None:
        """Take over what the report counts."""
        self.report = report
        self.refresh()

    def rows_done(self, count: int) -> None:
        """Count rows that are answered, failed or were done before; fewer than none where they are to be done again."""
        self._rows_done += count
        if self._bar is not None:
            self._bar.update(count)
        self.refresh()

    def start_prefill(self, name: str, tokens: int) -> None:
        """Show a bar for one document's prefill."""
        self._last_prefilled = time.monotonic()
        if self._bar is not None:
            self._prefill = tqdm(
                total=tokens,
                desc=f"prefill {printable(name)}",
                unit="token",
                leave=False,
                position=1,
                dynamic_ncols=True,
            )

    def prefilled(self, tokens: int) -> None:
        """Count tokens prefilled."""
        now = time.monotonic()
        self._tokens += tokens
        self._prefill_seconds += now - self._last_prefilled
        self._last_prefilled = now
        if self._prefill is not None:
            self._prefill.update(tokens)
        self.refresh()

    def end_prefill(self) -> None:
        """Take the prefill's bar away."""
        if self._prefill is not None:
            self._prefill.close()
        self._prefill = None

    def refresh(self) -> None:
        """Show how far the run is, if there is something new to show; to be called now and then."""
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self.pace().details()), refresh=False)
            self._bar.update(0)
            return
        now = time.monotonic()
        if not self._quiet and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            pace = self.pace()
            tell(str(pace), logging.INFO, **asdict(pace))
