"""Disks that are full, read-only or gone, and files that change: a run stops with a clear message, or goes on."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.execution.commit
from pipeline.errors import InputError, OutputError, PipelineError
from pipeline.progress import RunObserver
from tests import ROOT, warm
from tests.pipeline.steps import files_hold
from tests.pipeline.workplace import Workplace

SIZES = [4, 8, 16, 20, 32, 38, 40]  # of the disk, in pages; all of the job takes 44


class Disk:
    """A small disk of its own, mounted as a workplace's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, pages: int, how: str = "rw") -> None:
        self._mount("-o", f"remount,{how},size={pages * 4096}")

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self.folder)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={4096 * 64}", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file can grow larger, which the kernel says in other words (EFBIG) and at the same place as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> bytes:
    """What a run of the workplace's job writes that is not disturbed."""
    place = Workplace(tmp_path_factory.mktemp("undisturbed"), tiny_model)
    place.run()
    return place.output.read_bytes()


def stop(workplace: Workplace) -> PipelineError | None:
    """Why a run stops, if it does; nothing half is left."""
    from pipeline.execution.runner import Runner
    from pipeline.job.job_file import load_job

    try:
        Runner(load_job(workplace.job_file), RunObserver()).run()
    except PipelineError as error:
        return error
    finally:
        files_hold(workplace)
    return None


def stopped(workplace: Workplace) -> PipelineError:
    """Why a run stops."""
    error = stop(workplace)
    assert error is not None
    return error


def assert_clear(error: PipelineError) -> None:
    assert error.exit_code == 1
    assert "full" in str(error)
    assert "the same command resumes" in str(error)
    assert "\n" not in str(error)


def test_a_full_disk_stops_the_run_until_there_is_space(workplace: Workplace, disk: Disk, expected: bytes) -> None:
    for pages in SIZES:
        small = Workplace(disk.folder / "job", workplace.model)
        disk.resize(pages)
        assert_clear(stopped(small))
        assert not list(small.folder.rglob(".*"))
        disk.resize(1000)
        assert small.run().rows_failed == 0
        assert small.output.read_bytes() == expected
        shutil.rmtree(small.folder)


def test_a_full_disk_of_results(workplace: Workplace, disk: Disk, expected: bytes) -> None:
    workplace.tree["output"] = {"path": str(disk.folder / "a.parquet")}
    workplace.output = disk.folder / "a.parquet"
    workplace.save()
    committed, pages = set(), 1
    disk.resize(pages)
    while (error := stop(workplace)) is not None:
        assert_clear(error)
        assert isinstance(error, OutputError)
        assert not list(disk.folder.rglob(".*"))
        committed.add(files_hold(workplace))
        disk.resize(pages := pages + 1)
    assert committed >= {3, 9}  # amid the parts, and amid the finished file
    assert workplace.output.read_bytes() == expected


def test_a_full_disk_in_the_command_line(workplace: Workplace, disk: Disk) -> None:
    workplace.tree["cache"] = {"dir": str(disk.folder / "cache")}
    workplace.save()
    disk.resize(20)
    command = [sys.executable, "-m", "pipeline.cli", "run", str(workplace.job_file), "--quiet"]
    done = warm.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cache.dir: the disk of {disk.folder / 'cache'} is full")


# Of what the run file takes, of the first segment, and of the largest one.
@pytest.mark.parametrize("size", [0, 1000, 2500, 4000, 12_000, 25_000])
def test_a_file_that_cannot_grow_stops_the_run(workplace: Workplace, size: int, expected: bytes) -> None:
    workplace.save()
    with files_of_at_most(size):
        assert_clear(stopped(workplace))
    assert not list(workplace.folder.rglob(".*"))
    workplace.run()
    assert workplace.output.read_bytes() == expected


def test_a_disk_that_is_full_when_bytes_are_made_durable(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, expected: bytes
) -> None:
    real, fewest = os.fsync, 0
    while True:
        left = iter(range(fewest))

        def fsync(descriptor: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            workplace.run()
        except PipelineError as error:
            assert_clear(error)
        else:
            break
        finally:
            monkeypatch.setattr(os, "fsync", real)
        files_hold(workplace)
        fewest += 5
    workplace.run()
    assert workplace.output.read_bytes() == expected


# ---- what others do to the folders meanwhile


def at_commit(monkeypatch: pytest.MonkeyPatch, number: int, happens: Callable[[], Any]) -> None:
    """Something happens before a document's rows are committed, the ``number``-th's."""
    real, calls = pipeline.execution.commit.Committer.commit, []

    def commit(*args: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            happens()
        real(*args)

    monkeypatch.setattr(pipeline.execution.commit.Committer, "commit", commit)


@pytest.mark.parametrize("override", [(), ("cache.keep=job",), ("cache.budget=120000",)])
def test_a_store_that_becomes_read_only(
    workplace: Workplace,
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    override: tuple[str, ...],
    expected: bytes,
) -> None:
    workplace.tree["cache"] = {"dir": str(disk.folder / "cache")}
    at_commit(monkeypatch, 1, lambda: disk.resize(64, "ro"))
    report = workplace.run(*override)
    assert report.prefixes_built == 3
    assert workplace.output.read_bytes() == expected
    assert "goes on without storing" in caplog.text
    workplace.output.unlink()
    assert workplace.run(*override).prefixes_restored == 1
    assert workplace.output.read_bytes() == expected


def test_a_store_that_vanishes(workplace: Workplace, monkeypatch: pytest.MonkeyPatch, expected: bytes) -> None:
    at_commit(monkeypatch, 2, lambda: shutil.rmtree(workplace.cache))
    assert workplace.run().prefixes_built == 3
    assert workplace.output.read_bytes() == expected
    assert len(workplace.segments()) == 1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_result_folder_that_vanishes(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, number: int, expected: bytes
) -> None:
    with monkeypatch.context() as patch:
        at_commit(patch, number, lambda: shutil.rmtree(workplace.output.parent))
        if number > 1:  # what had been committed is gone
            with pytest.raises(OutputError, match="no row for query 'what'; run the job again"):
                workplace.run()
            assert not workplace.output.exists()
        assert workplace.run().prefixes_restored == (0 if number == 1 else number - 1)
    assert workplace.output.read_bytes() == expected


def test_documents_that_change_while_the_job_runs(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def grow() -> None:
        workplace.documents["d3"] = "One more."
        workplace.save()

    with monkeypatch.context() as patch:
        at_commit(patch, 2, grow)
        with pytest.raises(OutputError, match="document 'd3' has no row"):
            workplace.run()
    report = workplace.run()
    assert (report.rows_kept, report.rows_answered, len(workplace.rows())) == (9, 3, 12)


def test_documents_that_changed_between_runs(workplace: Workplace) -> None:
    workplace.run()
    old = workplace.rows()
    workplace.documents = {"new": "Quite new.", **workplace.documents, "d1": "Edited."}
    del workplace.documents["d2"]
    report = workplace.run()
    assert (report.rows_kept, report.rows_answered) == (3, 6)
    assert list(workplace.rows())[::3] == [("new", "what"), ("d0", "what"), ("d1", "what")]
    assert all(row == old[pair] for pair, row in workplace.rows().items() if pair[0] == "d0")


def test_a_column_that_is_gone_changes_nothing(workplace: Workplace) -> None:
    from pipeline.execution.runner import Runner
    from pipeline.job.job_file import load_job

    workplace.run()
    before = workplace.output.read_bytes()
    pq.write_table(pa.table({"id": ["d0"], "body": ["x"]}), workplace.folder / "docs.parquet")
    with pytest.raises(InputError, match="the column 'text'"):
        Runner(load_job(workplace.job_file), RunObserver()).run()
    assert workplace.output.read_bytes() == before
