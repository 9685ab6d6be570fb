"""What unfinished jobs still need."""

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
    needs = Pins(folder, output)
    needs.start(labels)
    return needs


def test_a_label_is_needed_as_often_as_it_is_given(tmp_path: Path) -> None:
    needs = started(tmp_path, "a", "b", "a")
    assert needs.wants("a")
    needs.done("a")
    assert needs.wants("a")
    needs.done("a")
    assert not needs.wants("a")
    assert needs.wants("b")
    assert not needs.wants("c")


def test_other_jobs_are_told(tmp_path: Path) -> None:
    first = started(tmp_path, "a", "b")
    second = Pins(tmp_path, Path("/results/b.parquet"))
    assert second.wants("b")
    first.done("a")
    first.done("b")
    first.finish()
    assert not second.wants("b")
    assert list((tmp_path / JOBS).iterdir()) == []


def test_what_an_interrupted_job_needs_stays_needed_for_a_week(tmp_path: Path) -> None:
    first = started(tmp_path, "a", "b")
    first.done("a")
    first.finish()
    looker = Pins(tmp_path)
    assert (looker.wants("a"), looker.wants("b")) == (False, True)
    (file,) = (tmp_path / JOBS).iterdir()
    week = 7 * 24 * 3600
    for age, wanted in ((week - 60, True), (week + 60, False), (-week, True)):  # the last: the clock was set back
        os.utime(file, (time.time() - age,) * 2)
        assert looker.wants("b") is wanted, age


def test_the_same_job_does_not_need_what_its_last_run_did(tmp_path: Path) -> None:
    started(tmp_path, "a", "b")
    assert not Pins(tmp_path, OUTPUT).wants("a")
    assert Pins(tmp_path, Path("/results/b.parquet")).wants("a")


def test_the_file_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, looker = started(tmp_path, "a", "b"), Pins(tmp_path)
    first.done("a")
    assert looker.wants("a")
    monkeypatch.setattr(module, "SECONDS_BETWEEN_WRITES", 0.0)
    first.done("b")
    assert not looker.wants("a")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"labels": 3}', b'{"labels": ["xyz"]}', b'{"labels": [1]}', b"\xff"]
)
def test_a_spoilt_file_counts_nothing(tmp_path: Path, content: bytes) -> None:
    started(tmp_path, "a")
    (file,) = (tmp_path / JOBS).iterdir()
    file.write_bytes(content)
    assert not Pins(tmp_path).wants("a")


def test_a_folder_that_refuses_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    needs = started(tmp_path / "file", "a")
    assert needs.wants("a")
    needs.done("a")
    needs.finish()
    looker = Pins(tmp_path)
    looker.start(["a"])
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_where_there_is_no_room_to_tell_others_nothing_is_told(tmp_path: Path) -> None:
    def no_room(_: int) -> None:
        raise BudgetTooSmall("cache.budget: too small")

    needs = Pins(tmp_path, OUTPUT)
    needs.start(["a"], no_room)
    assert needs.wants("a")
    assert not (tmp_path / JOBS).exists()
