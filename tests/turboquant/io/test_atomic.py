"""Files are replaced as a whole, whatever interrupts the writer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from turboquant.io.atomic import open_regular, remove_leftovers, replacing


def test_two_writers_of_one_file_use_different_temporary_files(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    with replacing(target) as one, replacing(target, ending=".part") as other:
        assert one != other
        assert other.name.endswith(".part")
        assert one.name.startswith(".tmp-a.json.")
        one.write_text("one")
        other.write_text("other")
    assert target.read_text() == "one"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [target]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(target) as temporary:
        temporary.write_text(str(1 // 0))
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_one_file_are_removed_and_those_of_others_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "a[1].json"
    gone = [tmp_path / ".tmp-a[1].json.0123abcd", tmp_path / ".tmp-a[1].json.0123abcd.part"]
    kept = [tmp_path / ".tmp-a1.json.0123abcd", tmp_path / ".tmp-a[1].json.copy.0123abcd", target]
    for file in gone + kept:
        file.write_text("x")
    remove_leftovers(target)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is not a regular file"):
        open_regular(tmp_path / "pipe")
