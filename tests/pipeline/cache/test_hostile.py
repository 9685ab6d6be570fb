"""Untrusted files: job files with multiplying aliases, links and pipes in a store, names with control characters.

Spoilt cache files: test_mutations.py. Hostile tensors: turboquant/io/test_segment_file.py. Pages: test_show.py.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cache.pins import Pins
from pipeline.cache.store import Store
from pipeline.cli import app
from pipeline.run.fingerprint import MEMO
from tests.pipeline.workplace import Workplace

ESCAPE = "\x1b]0;owned\x07"


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
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
