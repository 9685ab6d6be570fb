"""What is shown while a run goes on: lines where nobody watches, bars on a terminal, nothing if quiet."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest

from pipeline import progress
from pipeline.progress import Progress, with_progress_bar
from pipeline.report import Report


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


class Terminal(io.StringIO):
    """Takes the place of stderr; not in a fixture, since pytest swaps stderr between fixtures and test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(sys, "stderr", self)

    def isatty(self) -> bool:
        return True


@contextmanager
def started(rows: int, quiet: bool = False) -> Iterator[Progress]:
    shown = Progress(quiet)
    shown.run_started(rows)
    yield shown
    shown.run_ended()


def work(clock: Clock, quiet: bool = False) -> None:
    report = Report(documents=3)
    with started(12, quiet) as shown:
        for name in "abc":
            shown.prefill_started(name, 4000)
            for _ in range(4):
                clock.now += 10
                shown.prefill_advanced(1000)
            shown.prefill_ended()
            for _ in range(4):
                clock.now += 2
                shown.rows_done(1)
            report.documents_done += 1
            report.prefixes_built += name != "b"
            report.prefixes_restored += name == "b"
            shown.documents_done([name], report)


def test_a_line_every_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock)
    out, lines = capsys.readouterr()
    assert out == ""
    assert lines.splitlines() == [
        "30 s: 0 of 12 rows, prefill 100 tokens/s",
        "68 s: 4 of 12 rows, 1:16 left, 1/3 documents, 0.0588 answers/s, 0% hits, prefill 100 tokens/s",
        "106 s: 8 of 12 rows, 0:38 left, 2/3 documents, 0.0755 answers/s, 50% hits, prefill 100 tokens/s",
        "136 s: 8 of 12 rows, 0:08 left, 2/3 documents, 0.0588 answers/s, 50% hits, prefill 100 tokens/s",
    ]


@pytest.mark.parametrize(
    "sizes", [[1000, 16_000] * 10, [16_000, 1000] * 10, [4000] * 20, [500 * n for n in range(8, 28)]]
)
def test_the_time_left_does_not_rise_and_fall_with_each_document(clock: Clock, sizes: list[int]) -> None:
    left: list[tuple[float, float]] = []  # the estimate, and the truth
    report = Report(documents=20)
    end = clock.now + sum(size / 100 + size / 250 for size in sizes) + 20 * 40
    with started(20 * 10, quiet=True) as shown:

        def look() -> None:
            estimate = shown.pace().seconds_left
            assert (estimate is None) == (number == 0)  # until the second document has started
            if estimate is not None:
                left.append((estimate, end - clock.now))

        for number, size in enumerate(sizes):
            shown.prefill_started(f"d{number}", size)
            for _ in range(size // 500):
                clock.now += 5
                shown.prefill_advanced(500)
                look()
            clock.now += size / 250  # compression
            shown.prefill_ended()
            clock.now += 38  # all rows of a batch end at about the same time
            look()
            for _ in range(10):
                clock.now += 0.2
                shown.rows_done(1)
                look()
            report.documents_done += 1
            report.prefixes_built += 1
            shown.documents_done([f"d{number}"], report)
            look()
    wrong = [estimate / truth for estimate, truth in left if truth > 200]
    assert 1 / 2 < min(wrong) <= max(wrong) < 2
    later = [(estimate, truth) for estimate, truth in left if 200 < truth < left[0][1] * 0.8]
    assert all(after / before < 2 for (before, _), (after, _) in pairwise(later))
    assert all(1 / 2 < estimate / truth < 2 for estimate, truth in later)


def test_a_line_also_where_nothing_happens(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with started(12) as shown:
        for _ in range(7):
            clock.now += 10
            shown.refresh()
    assert capsys.readouterr().err.splitlines() == ["30 s: 0 of 12 rows", "60 s: 0 of 12 rows"]


def test_rows_of_earlier_runs_say_nothing_about_the_pace(clock: Clock) -> None:
    with started(100, quiet=True) as shown:
        shown.rows_done(80)
        clock.now += 10
        shown.rows_done(10)
        shown.documents_done(["a"], Report(rows_kept=80, rows_answered=10))
        assert (shown.pace().answers_per_second, shown.pace().seconds_left) == (1, 10)


def test_failed_and_skipped_rows_of_earlier_runs_say_nothing_about_it_either(clock: Clock) -> None:
    report = Report(rows_kept=60, rows_failed=10, rows_skipped=10, rows_kept_unanswered=20)
    with started(100, quiet=True) as shown:
        shown.rows_done(80)
        clock.now += 10
        shown.rows_done(10)
        shown.documents_done(["a"], replace(report, rows_answered=10))
        assert (shown.pace().answers_per_second, shown.pace().seconds_left) == (1, 10)


def test_the_rows_of_an_earlier_process_are_done_whatever_became_of_them(clock: Clock) -> None:
    shown = Progress(quiet=True, report=Report(rows_kept=1, rows_answered=2, rows_failed=3, rows_skipped=4))
    shown.run_started(12)
    shown.rows_done(2)
    assert (shown.pace().rows_done, shown.pace().rows) == (12, 12)


def test_a_short_run_shows_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with started(2) as shown:
        shown.rows_done(2)
    assert capsys.readouterr() == ("", "")


def test_quiet_shows_nothing(clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    work(clock, quiet=True)
    assert capsys.readouterr() == ("", "")
    terminal = Terminal(monkeypatch)
    work(clock, quiet=True)
    assert terminal.getvalue() == ""


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    with started(3) as shown:
        shown.prefill_started("minutes-1", 1000)
        shown.prefill_advanced(1000)
        shown.prefill_ended()
        shown.rows_done(3)
    screen = terminal.getvalue()
    assert "rows: 100%" in screen
    assert "3/3" in screen
    assert "prefill minutes-1:" in screen
    assert "rows, " not in screen


def test_rows_to_be_done_again_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    with started(3) as shown:
        shown.rows_done(2)
        shown.rows_done(-1)
    assert "1/3" in terminal.getvalue().rsplit("\r", 1)[-1]


def test_log_lines_stand_on_lines_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    log = logging.getLogger("pipeline.test")
    root, handler = logging.getLogger(), logging.StreamHandler(terminal)
    root.addHandler(handler)
    try:
        with started(3) as shown:
            shown.rows_done(1)
            log.warning("prefix rejected")
        log.warning("and after")
    finally:
        root.removeHandler(handler)
    lines = terminal.getvalue().replace("\r", "\n").splitlines()
    assert "prefix rejected" in lines
    assert "and after" in lines
    assert handler not in root.handlers


def test_a_bar_over_documents_only_where_somebody_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BEFORE_BAR", 0)
    assert list(with_progress_bar("abc", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    terminal = Terminal(monkeypatch)
    assert list(with_progress_bar("abc", 3, quiet=True)) == ["a", "b", "c"]
    assert terminal.getvalue() == ""
    assert list(with_progress_bar("abc", 3)) == ["a", "b", "c"]
    assert "documents:" in terminal.getvalue()
    assert "/3" in terminal.getvalue()
