"""Untrusted files: job files with multiplying aliases, links and pipes in a store, names with control characters.

Spoilt cache files: test_mutations.py. Hostile tensors: turboquant/io/test_segment_file.py. Pages: test_show.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from pipeline.cache.pins import Pins, output_digest
from pipeline.cache.store import Store
from pipeline.execution.fingerprint import MEMO
from tests.pipeline import command_line
from tests.pipeline.workplace import Workplace

ESCAPE = "\x1b]0;owned\x07"


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = command_line.invoke(*arguments)
    return result.exit_code, result.stdout, result.stderr


def test_aliases_that_multiply_are_refused(workplace: Workplace) -> None:
    """Nine lists of nine of the one before would be 387 million values."""
    lists = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    workplace.job_file.write_text(workplace.job_file.read_text() + "\n".join(lists) + "\n")
    code, _, error = invoke("plan", workplace.job_file)
    assert code == 2
    assert "aliases multiply to more than 1,000,000 values" in error


def test_aliases_that_do_not_multiply_are_allowed(workplace: Workplace) -> None:
    text = workplace.job_file.read_text()
    workplace.job_file.write_text(text.replace("dir: cache", "dir: &where cache") + "name: *where\n")
    assert invoke("plan", workplace.job_file)[0] == 0


def test_a_link_in_the_store_is_not_followed(workplace: Workplace, tmp_path: Path) -> None:
    """This holds when the store is shrunk, and when a segment is written to the path of the link."""
    workplace.run()
    (victim := tmp_path / "elsewhere").mkdir()
    for name in (".profile", "letter.txt"):
        (victim / name).write_text("mine")
    folder = workplace.segments()[0]
    shutil.rmtree(folder)
    folder.symlink_to(victim)
    assert invoke("cache", "gc", workplace.cache, "--budget", "1kB")[0] == 0
    workplace.output.unlink()
    workplace.run()
    assert sorted(path.name for path in victim.iterdir()) == [".profile", "letter.txt"]
    assert not folder.is_symlink()


@pytest.mark.parametrize("name", ["segment.json", "segment.safetensors"])
def test_a_pipe_in_place_of_a_segment_file_is_not_read(name: str, workplace: Workplace) -> None:
    """To read it would block the run without end."""
    workplace.run()
    answers = workplace.output.read_bytes()
    for folder in workplace.segments():
        (folder / name).unlink()
        os.mkfifo(folder / name)
    workplace.output.unlink()
    report = workplace.run()
    assert report.prefixes_built == 3
    assert workplace.output.read_bytes() == answers


@pytest.mark.parametrize("name", ["jobs/another.json", "locks/name", MEMO])
def test_a_pipe_among_the_other_files_of_a_store_is_not_read(name: str, workplace: Workplace) -> None:
    file = workplace.cache / name
    file.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(file)
    report = workplace.run()
    assert (report.rows_answered, report.prefixes_built) == (9, 3)
    assert not Pins(workplace.cache).is_pinned("a context")
    assert len(Store(workplace.cache).folder_id()) == (0 if name == "locks/name" else 32)


def test_control_characters_in_names_are_not_sent_to_the_terminal(workplace: Workplace) -> None:
    workplace.documents[f"d3{ESCAPE}"] = ""
    workplace.save()
    shown = [
        invoke("run", workplace.job_file),
        invoke("show", workplace.job_file),
        invoke("cache", "ls", workplace.cache),
    ]
    assert [code for code, _, _ in shown] == [3, 0, 0]
    assert "d3\ufffd]0;owned\ufffd" in shown[0][2] + shown[0][1]
    for _, out, error in shown:
        assert not {"\x1b", "\x07"} & set(out + error)


@pytest.mark.parametrize("name", ["locks", "jobs", "rejected"])
def test_a_link_in_the_place_of_a_folder_is_refused(name: str, workplace: Workplace, tmp_path: Path) -> None:
    (victim := tmp_path / "elsewhere").mkdir()
    (victim / "letter.txt").write_text("mine")
    workplace.cache.mkdir()
    (workplace.cache / name).symlink_to(victim)
    code, _, error = invoke("run", workplace.job_file)
    assert code != 0
    assert f"cache.dir: {workplace.cache / name} is a link, and a store may hold none; remove it" in error
    assert [path.name for path in victim.iterdir()] == ["letter.txt"]


def test_a_bucket_that_is_a_link_stores_nothing(
    workplace: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workplace.run()
    (victim := tmp_path / "elsewhere").mkdir()
    bucket = workplace.segments()[0].parent
    shutil.rmtree(bucket)
    bucket.symlink_to(victim)
    workplace.output.unlink()
    assert workplace.run().rows_failed == 0
    assert f"{bucket} is a link or a file, where a folder belongs; remove it" in caplog.text
    assert list(victim.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["index.sqlite", "index.sqlite-journal", "locks/write.lock", "locks/name", MEMO, "jobs/{job}.json"]
)
def test_a_file_that_is_a_link_is_not_written_through(name: str, workplace: Workplace, tmp_path: Path) -> None:
    """A run with a budget, which uses the index, locks, pins and the memo."""
    (victim := tmp_path / "letter.txt").write_text("mine")
    link = workplace.cache / name.format(job=output_digest(workplace.output))
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim)
    assert workplace.run("cache.budget=10MB").rows_answered == 9
    assert len(Store(workplace.cache).folder_id()) in (0, 32)
    assert invoke("cache", "gc", workplace.cache, "--budget", "1kB")[0] == 0
    assert victim.read_text() == "mine"


def test_an_unreadable_store_is_not_called_empty(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.run()

    def refuse(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    for command in ("ls", "verify", "gc"):
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.cache.entries.os.scandir", refuse)
            code, out, error = invoke("cache", command, workplace.cache)
        assert (code, out) == (1, "")
        assert "Permission denied" in error
        assert len(error.splitlines()) == 1


FOREIGN = "CREATE TABLE entries (key); CREATE TRIGGER t AFTER INSERT ON entries BEGIN SELECT 1; END"


@pytest.mark.parametrize("damage", ["lost", "text", "cut off", "foreign", "flipped", "escaping", "typed", "folder"])
def test_a_damaged_index_is_made_again(workplace: Workplace, tmp_path: Path, damage: str) -> None:
    workplace.run("cache.budget=10MB")
    file = workplace.cache / "index.sqlite"
    expected = json.loads(invoke("cache", "ls", workplace.cache, "--json")[1])
    content = bytearray(file.read_bytes())
    if damage not in ("escaping", "typed"):
        file.unlink()
    if damage == "text":
        file.write_text("not a database" * 99)
    elif damage == "cut off":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        for position in range(1100, len(content), 97):
            content[position] ^= 0x55
        file.write_bytes(content)
    elif damage == "foreign":
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.executescript(FOREIGN)
    elif damage == "escaping":
        with contextlib.closing(sqlite3.connect(file)) as database, database:
            database.execute(
                "UPDATE entries SET key = '../../elsewhere', bucket = '..', problem = 'bad' WHERE document = 'd0'"
            )
    elif damage == "typed":  # a column holds bytes, as one bit of SQLite's file can make it
        with contextlib.closing(sqlite3.connect(file)) as database, database:
            database.execute("UPDATE entries SET created = CAST('yesterday' AS BLOB) WHERE document = 'd0'")
    elif damage == "folder":
        file.mkdir()
    (tmp_path / "elsewhere").mkdir()
    assert [one["key"] for one in json.loads(invoke("cache", "ls", workplace.cache, "--json")[1])] == [
        one["key"] for one in expected
    ]
    workplace.output.unlink()
    report = workplace.run("cache.budget=10MB", "cache.keep=job")
    assert (report.rows_failed, report.prefixes_restored) == (0, 3)
    assert invoke("cache", "gc", workplace.cache, "--budget", "1kB")[0] == 0
    assert workplace.segments() == []
    assert (tmp_path / "elsewhere").exists()
