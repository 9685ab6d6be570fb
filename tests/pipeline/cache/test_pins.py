"""Pins: the contexts that unfinished jobs still need."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.cache import pins as module
from pipeline.cache.pins import JOBS, Pins
from pipeline.errors import BudgetTooSmall

OUTPUT = Path("/results/a.parquet")


def started(folder: Path, *labels: str, output: Path = OUTPUT) -> Pins:
    pins = Pins(folder, output)
    pins.pin(labels)
    return pins


def test_a_label_is_pinned_as_often_as_it_is_given(tmp_path: Path) -> None:
    pins = started(tmp_path, "a", "b", "a")
    assert pins.is_pinned("a")
    pins.unpin("a")
    assert pins.is_pinned("a")
    pins.unpin("a")
    assert not pins.is_pinned("a")
    assert pins.is_pinned("b")
    assert not pins.is_pinned("c")


def test_other_jobs_see_the_pins(tmp_path: Path) -> None:
    first = started(tmp_path, "a", "b")
    second = Pins(tmp_path, Path("/results/b.parquet"))
    assert second.is_pinned("b")
    first.unpin("a")
    first.unpin("b")
    first.close()
    assert not second.is_pinned("b")
    assert list((tmp_path / JOBS).iterdir()) == []


def test_pins_of_an_interrupted_job_last_a_week(tmp_path: Path) -> None:
    first = started(tmp_path, "a", "b")
    first.unpin("a")
    first.close()
    observer = Pins(tmp_path)
    assert (observer.is_pinned("a"), observer.is_pinned("b")) == (False, True)
    (file,) = (tmp_path / JOBS).iterdir()
    week = 7 * 24 * 3600
    for age, wanted in ((week - 60, True), (week + 60, False), (-week, True)):  # the last: the clock was set back
        os.utime(file, (time.time() - age,) * 2)
        assert observer.is_pinned("b") is wanted, age


def test_pins_of_the_last_run_do_not_count_for_the_same_job(tmp_path: Path) -> None:
    started(tmp_path, "a", "b")
    assert not Pins(tmp_path, OUTPUT).is_pinned("a")
    assert Pins(tmp_path, Path("/results/b.parquet")).is_pinned("a")


def test_the_file_is_updated_at_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, observer = started(tmp_path, "a", "b"), Pins(tmp_path)
    first.unpin("a")
    assert observer.is_pinned("a")
    monkeypatch.setattr(module, "SECONDS_BETWEEN_WRITES", 0.0)
    first.unpin("b")
    assert not observer.is_pinned("a")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"labels": 3}', b'{"labels": ["xyz"]}', b'{"labels": [1]}', b"\xff"]
)
def test_a_damaged_file_is_ignored(tmp_path: Path, content: bytes) -> None:
    started(tmp_path, "a")
    (file,) = (tmp_path / JOBS).iterdir()
    file.write_bytes(content)
    assert not Pins(tmp_path).is_pinned("a")


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    pins = started(tmp_path / "file", "a")
    assert pins.is_pinned("a")
    pins.unpin("a")
    pins.close()
    observer = Pins(tmp_path)
    observer.pin(["a"])
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_without_room_for_the_file_other_jobs_see_no_pins(tmp_path: Path) -> None:
    def no_room(_: int) -> None:
        raise BudgetTooSmall("cache.budget: too small")

    pins = Pins(tmp_path, OUTPUT)
    pins.pin(["a"], no_room)
    assert pins.is_pinned("a")
    assert not (tmp_path / JOBS).exists()
