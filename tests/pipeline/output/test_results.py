from __future__ import annotations

import errno
import functools
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import JobError, OutputError
from pipeline.output.results import Results
from pipeline.output.rows import SCHEMA, Row, read_metadata
from tests import warm

QUERIES = ["a", "b"]


def row(document_id: str, query_id: str, fingerprint: str = "f0") -> Row:
    return Row(document_id, query_id, "ok", fingerprint, answer=f"{document_id}/{query_id}/{fingerprint}")


def rows(document_id: str, fingerprint: str = "f0") -> list[Row]:
    return [row(document_id, query_id, fingerprint) for query_id in QUERIES]


def expected(*document_ids: str) -> list[tuple[str, list[str]]]:
    return [(document_id, QUERIES) for document_id in document_ids]


def run(output: Path, document_ids: list[str], fingerprint: str = "f0") -> None:
    """Do the work of the runner: answer missing and outdated rows, commit them, finish."""
    with Results(output, {"job": "j"}) as results:
        for document_id in document_ids:
            known = results.rows(document_id)
            if {key: known[key].fingerprint for key in known} != dict.fromkeys(QUERIES, fingerprint):
                results.commit({document_id: rows(document_id, fingerprint)})
        results.finish(expected(*document_ids))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "answers.parquet"


def test_a_row_has_the_columns_of_the_file() -> None:
    assert {field.name for field in fields(Row)} == set(SCHEMA.names)


def test_rows_come_back_as_committed(output: Path) -> None:
    failed = Row("d", "b", "error", "f1", error_type="ContextTooLong", error="too long", context_tokens=9)
    with Results(output) as results:
        assert results.rows("d") == {}
        results.commit({"d": [row("d", "a"), failed]})
        assert results.rows("d") == {"a": row("d", "a"), "b": failed}
        results.commit({"d": [row("d", "a", "f2")]})
        assert results.rows("d") == {"a": row("d", "a", "f2")}
    with Results(output) as results:
        assert results.rows("d") == {"a": row("d", "a", "f2")}


def test_the_finished_file_is_in_the_given_order_and_the_parts_are_gone(output: Path) -> None:
    with Results(output, {"job": "é1"}) as results:
        for document_id in ("1", "2", "3"):
            results.commit({document_id: [row(document_id, query) for query in ("a", "b", "dropped")]})
        results.finish([("3", ["b", "a"]), ("1", ["a"])])
        assert results.rows("3") == {"a": row("3", "a"), "b": row("3", "b")}
        assert results.rows("2") == {}
    table = pq.read_table(output)
    assert table.column_names == SCHEMA.names
    pairs = zip(table["document_id"].to_pylist(), table["query_id"].to_pylist(), strict=True)
    assert list(pairs) == [("3", "b"), ("3", "a"), ("1", "a")]
    assert table.schema.metadata[b"job"] == "é1".encode()
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "answers.parquet",
        "answers.parquet.lock",
    ]


def test_an_empty_result_is_a_file_without_rows(output: Path) -> None:
    with Results(output) as results:
        results.finish([])
    assert pq.read_table(output).num_rows == 0


def test_the_same_rows_give_the_same_bytes(output: Path, tmp_path: Path) -> None:
    run(output, ["1", "2", "3"])
    first = output.read_bytes()
    run(output, ["1", "2", "3"])
    assert output.read_bytes() == first
    # Another order of work, and an earlier run with other fingerprints.
    other = tmp_path / "other.parquet"
    run(other, ["2"], "old")
    with Results(other) as results:
        results.commit({"3": rows("3")})
    run(other, ["1", "2", "3"])
    assert other.read_bytes() == first


def test_a_finished_file_is_continued(output: Path) -> None:
    run(output, ["1", "2"])
    with Results(output) as results:
        assert results.rows("2") == {"a": row("2", "a"), "b": row("2", "b")}
        assert results.rows("3") == {}
        results.commit({"2": [row("2", "a", "new")]})
        assert results.rows("2") == {"a": row("2", "a", "new")}
        results.finish([("2", ["a"]), ("1", ["b"])])
    assert pq.read_table(output)["answer"].to_pylist() == ["2/a/new", "1/b/f0"]


def test_rows_are_found_across_row_groups(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.output.rows._DOCUMENTS_PER_GROUP", 2)
    ids = [str(number) for number in range(7)]
    run(output, ids)
    assert pq.ParquetFile(output).metadata.num_row_groups == 4
    # Rewritten by another program, a document's rows may stand in two groups.
    pq.write_table(pq.read_table(output), output, row_group_size=3)
    with Results(output, read_only=True) as results:
        for document_id in (*ids, *reversed(ids)):
            assert list(results.rows(document_id).values()) == rows(document_id)


def test_a_row_group_is_bounded_by_its_bytes(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.output.rows._BYTES_PER_GROUP", 1000)
    run(output, [str(number) for number in range(6)])
    assert pq.ParquetFile(output).metadata.num_row_groups == 2


def test_a_missing_row_leaves_the_old_file(output: Path) -> None:
    run(output, ["1"])
    before = output.read_bytes()
    with Results(output) as results:
        results.commit({"2": [row("2", "a")]})
        with pytest.raises(OutputError, match="document '2' has no row for query 'b'; run the job again"):
            results.finish(expected("1", "2"))
        assert results.rows("2") == {"a": row("2", "a")}
    assert output.read_bytes() == before
    assert not list(output.parent.glob(".tmp-*"))


def test_pairs_are_expected_and_committed_once(output: Path) -> None:
    with Results(output) as results:
        with pytest.raises(ValueError, match="given twice"):
            results.commit({"1": [row("1", "a"), row("1", "a")]})
        with pytest.raises(ValueError, match="another document's"):
            results.commit({"1": [row("2", "a")]})
        results.commit({"1": rows("1")})
        with pytest.raises(ValueError, match="expected twice"):
            results.finish(expected("1", "1"))
        with pytest.raises(ValueError, match="expected twice"):
            results.finish([("1", ["a", "a"])])


def test_two_runs_cannot_write_one_result(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.output.results.SECONDS_FOR_LOCK", 0)
    with Results(output) as results:
        with pytest.raises(OutputError, match=f"{output}: another run is writing"), Results(output):
            pass
        results.commit({"1": rows("1")})
        with Results(output, read_only=True) as looking:
            assert set(looking.rows("1")) == {"a", "b"}
    with Results(output):
        pass


def test_a_lock_that_is_let_go_is_waited_for(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output.parent.mkdir()
    with FileLock(f"{output}.lock") as held:
        monkeypatch.setattr("time.sleep", lambda _: held.release())  # what the lock does between two tries
        with Results(output) as results:
            results.commit({"1": rows("1")})


def test_read_only_changes_nothing(output: Path) -> None:
    with Results(output, read_only=True) as results:
        assert results.rows("1") == {}
        with pytest.raises(RuntimeError):
            results.commit({"1": rows("1")})
    assert not output.parent.exists()
    with Results(output) as results:
        results.commit({"1": rows("1")})
    (part,) = output.parent.glob("*.parts/*/*.parquet")
    part.write_bytes(part.read_bytes()[:-9])
    part.with_name(".tmp-x").write_text("being written")
    before = sorted(output.parent.rglob("*"))
    with Results(output, read_only=True) as results:
        assert results.rows("1") == {}
    assert sorted(output.parent.rglob("*")) == before


@pytest.mark.parametrize("earlier", [[], ["2"]])
def test_a_run_that_ends_while_its_rows_are_read_takes_none_away(output: Path, earlier: list[str]) -> None:
    """It moves them from the parts to the finished file."""
    names = ["1", "2", "3"]
    if earlier:
        run(output, earlier, "older")
    with Results(output) as writing:
        writing.commit({name: rows(name) for name in names})
        opened = [Results(output, read_only=True) for _ in range(3)]
        with opened[0] as reading, opened[1] as listing, opened[2] as late:
            pairs = listing.pairs()
            found = dict([next(pairs)])
            assert list(reading.rows("1").values()) == rows("1")
            writing.finish(expected(*names))
            assert not writing.parts.exists()
            assert reading.exist
            assert [list(reading.rows(name).values()) for name in names] == [rows(name) for name in names]
            assert found | dict(pairs) == dict(late.pairs()) == dict(expected(*names))


def _truncate(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:100])


def _empty(part: Path) -> None:
    part.write_bytes(b"")


def _flip_a_bit(part: Path) -> None:
    content = bytearray(part.read_bytes())
    # In a page of the column `answer`: caught by the page's checksum.
    chunk = pq.ParquetFile(part).metadata.row_group(0).column(SCHEMA.get_field_index("answer"))
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    part.write_bytes(content)


def _write_other_columns(part: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), part)


def _write_another_document(part: Path) -> None:
    with Results(part.parents[2] / "other.parquet") as other:
        other.commit({"2": rows("2")})
    (source,) = part.parents[2].glob("other.parquet.parts/*/*.parquet")
    shutil.copy(source, part)


@pytest.mark.parametrize("damage", [_truncate, _empty, _flip_a_bit, _write_other_columns, _write_another_document])
def test_a_bad_part_is_set_aside_and_not_done(output: Path, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    with Results(output) as results:
        results.commit({"1": rows("1")})
    (part,) = output.parent.glob("answers.parquet.parts/*/*.parquet")
    damage(part)
    with caplog.at_level(logging.WARNING), Results(output) as results:
        assert results.rows("1") == {}
        assert "count as not done" in caplog.text
        assert [path.name for path in part.parent.iterdir()] == [f".bad-{part.name}"]
        results.commit({"1": rows("1")})
        assert set(results.rows("1")) == {"a", "b"}
        results.finish(expected("1"))
    assert not Path(f"{output}.parts").exists()


REASONS_THAT_PASS = [
    *(OSError(number, os.strerror(number)) for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES)),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    MemoryError("out of memory"),
    pa.ArrowMemoryError("malloc of size 64 failed"),
]


@pytest.mark.parametrize("several", [False, True], ids=["part", "group"])
@pytest.mark.parametrize("reason", REASONS_THAT_PASS, ids=repr)
def test_a_part_that_cannot_be_read_at_the_moment_is_not_set_aside(
    output: Path, reason: Exception, several: bool
) -> None:
    with Results(output) as results:
        results.commit({"1": rows("1")})
    (part,) = output.parent.glob("answers.parquet.parts/*/*.parquet")
    if several:
        part = part.rename(part.parents[1] / ".group")
    fails = mock.patch("pipeline.output.rows.open_followed", side_effect=reason)
    told = pytest.raises(OutputError, match=f"{part}: cannot be read at the moment: .*; nothing of it is thrown away")
    if several:
        with fails, told, Results(output):
            pass
    else:
        with Results(output) as results, fails, told:
            results.rows("1")
    with Results(output) as results:
        assert set(results.rows("1")) == {"a", "b"}


def test_a_finished_file_that_cannot_be_read_at_the_moment_is_not_answered_again(output: Path) -> None:
    run(output, ["1"])
    before = output.read_bytes()

    class FailingDisk(io.BytesIO):
        may_fail = False

        def read(self, size: int | None = -1) -> bytes:
            if self.may_fail:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(size)

    disk = FailingDisk(before)
    with (
        mock.patch("pipeline.output.rows.open_followed", side_effect=[FileNotFoundError, disk, FileNotFoundError]),
        Results(output) as results,
    ):
        disk.may_fail = True
        with pytest.raises(OutputError, match=f"{output}: cannot be read at the moment: .*Input/output error"):
            results.rows("1")
    assert output.read_bytes() == before


def test_a_pipe_in_place_of_a_part_is_set_aside(output: Path) -> None:
    with Results(output) as results:
        results.commit({"1": rows("1")})
        (part,) = output.parent.glob("answers.parquet.parts/*/*.parquet")
        part.unlink()
        os.mkfifo(part)
        assert results.rows("1") == {}
        assert [path.name for path in part.parent.iterdir()] == [f".bad-{part.name}"]


@pytest.mark.parametrize("read", [lambda output: Results(output).__enter__(), read_metadata], ids=["run", "merge"])
def test_a_pipe_in_place_of_a_result_is_no_result(output: Path, read: Callable[[Path], object]) -> None:
    output.parent.mkdir()
    os.mkfifo(output)
    with pytest.raises(JobError, match=f"{output}: .*(is a device or a pipe|it is not a regular file)"):
        read(output)


def test_no_flipped_bit_gives_a_wrong_row(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Results(output) as results:
        results.commit({"1": rows("1")})
    (part,) = output.parent.glob("answers.parquet.parts/*/*.parquet")
    content = part.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    with Results(output, read_only=True) as results:
        good = results.rows("1")
        for position in range(footer):
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            part.write_bytes(damaged)
            assert results.rows("1") in ({}, good)


def test_a_damaged_finished_file_is_answered_again(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(output, ["1"])
    before = output.read_bytes()
    _flip_a_bit(output)
    with caplog.at_level(logging.WARNING):
        run(output, ["1"])
    assert "damaged" in caplog.text
    assert output.read_bytes() == before


@pytest.mark.parametrize("content", [b"my notes", b"", None])
def test_a_file_that_is_no_result_is_never_replaced(output: Path, content: bytes | None) -> None:
    output.parent.mkdir()
    if content is None:
        pq.write_table(pa.table({"x": [1]}), output)
    else:
        output.write_bytes(content)
    before = output.read_bytes()
    with pytest.raises(JobError, match="is not a result that can be continued"), Results(output):
        pass
    assert output.read_bytes() == before
    # The lock is free again.
    output.unlink()
    with Results(output):
        pass


def test_an_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="is a folder"), Results(tmp_path):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"), Results(tmp_path / "file" / "a.parquet"):
        pass


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(output: Path) -> None:
    with Results(output) as results:
        results.commit({"1": rows("1")})
        with (
            mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")),
            pytest.raises(
                OutputError, match=r"cannot be written: the disk is full; free some space: .* the same command resumes"
            ),
        ):
            results.commit({"1": rows("1", "f1")})
        assert results.rows("1")["a"].fingerprint == "f0"
    assert not list(output.parent.rglob(".tmp-*"))


def test_parts_are_a_dataset_while_a_run_writes(output: Path) -> None:
    with Results(output) as results:
        for document_id in ("1", "2"):
            results.commit({document_id: rows(document_id)})
        for folder in Path(f"{output}.parts").iterdir():
            (folder / ".tmp-x.parquet").write_bytes(b"half")
            (folder / ".bad-x.parquet").write_bytes(b"bad")
        assert ds.dataset(f"{output}.parts", format="parquet").to_table().num_rows == 4


class Crash(BaseException):
    """It is no Exception, so no handler cleans up, as after SIGKILL."""


@contextmanager
def crash_at(step: int, before: bool) -> Iterator[None]:
    """Die before or after the `step`-th operation that changes the disk."""
    count = 0

    def dying(real: Any) -> Any:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step and before:
                raise Crash
            result = real(*args, **kwargs)
            if count == step:
                raise Crash
            return result

        return operation

    names = ("replace", "fsync", "mkdir", "unlink", "rmdir")
    patches = [mock.patch(f"os.{name}", dying(getattr(os, name))) for name in names]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


_IDS = ["1", "2", "3"]


def _crash_then_resume(folder: Path, crashes: list[tuple[int, bool]]) -> bytes:
    output = folder / "answers.parquet"
    run(output, ["2", "1"], "old")
    for step, before in crashes:
        try:
            with crash_at(step, before):
                run(output, _IDS, "new")
        except Crash:
            pass
        with Results(output, read_only=True) as results:
            for document_id in _IDS:
                known = list(results.rows(document_id).values())
                assert known in ([], rows(document_id, "old"), rows(document_id, "new"))
    run(output, _IDS, "new")
    assert sorted(path.name for path in folder.iterdir()) == ["answers.parquet", "answers.parquet.lock"]
    return output.read_bytes()


@functools.cache
def _undisturbed() -> bytes:
    """Return the bytes of a result whose runs did not crash."""
    with tempfile.TemporaryDirectory() as calm:
        return _crash_then_resume(Path(calm), [])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=4))
def test_crashes_anywhere_lose_nothing_and_change_nothing(crashes: list[tuple[int, bool]]) -> None:
    with tempfile.TemporaryDirectory() as stormy:
        assert _crash_then_resume(Path(stormy), crashes) == _undisturbed()


@pytest.mark.parametrize("before", [True, False])
def test_a_crash_at_every_step_of_a_run(tmp_path: Path, before: bool) -> None:
    for step in range(1, 40):
        assert _crash_then_resume(tmp_path / str(step), [(step, before)]) == _undisturbed()


@pytest.mark.parametrize("before", [True, False])
def test_documents_committed_together_survive_a_crash_together(tmp_path: Path, before: bool) -> None:
    seen = set()
    for step in range(1, 30):
        output = tmp_path / str(step) / "answers.parquet"
        with Results(output) as results:
            results.commit({"1": rows("1", "old")})
            try:
                with crash_at(step, before):
                    results.commit({key: rows(key, "new") for key in _IDS})
            except Crash:
                pass
        with Results(output) as results:
            known = [list(results.rows(key).values()) for key in _IDS]
        assert known in ([rows("1", "old"), [], []], [rows(key, "new") for key in _IDS])
        assert [path.name for path in (tmp_path / str(step)).rglob(".*")] == []
        seen.add(len(known[1]))
    assert seen == {0, 2}


def test_a_group_that_cannot_be_read_is_set_aside(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Results(output) as results:
        results.commit({"1": rows("1")})
    (results.parts / ".group").write_bytes(b"no Parquet")
    with Results(output) as results:
        assert set(results.rows("1")) == set(QUERIES)
    assert (results.parts / ".bad-.group").exists()
    assert "cannot be used" in caplog.text


_COMMIT_FOR_EVER = """
import sys
from pathlib import Path
from pipeline.output.results import Results
from pipeline.output.rows import Row
from tests import warm

with Results(Path(sys.argv[1])) as results:
    for number in range(1_000_000):
        text = f"{number} " * 20_000
        results.commit({str(number % 3): [Row(str(number % 3), q, "ok", str(number), text) for q in "ab"]})
        print(number, flush=True)
"""


@pytest.mark.parametrize("commits", [1, 5, 20])
def test_a_killed_run_keeps_its_committed_rows(output: Path, commits: int) -> None:
    command = [sys.executable, "-c", _COMMIT_FOR_EVER, str(output)]
    with warm.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        committed = [int(next(process.stdout)) for _ in range(commits)]
        process.kill()
    with Results(output) as results:
        for document_id in {str(number % 3) for number in committed}:
            known = results.rows(document_id)
            newest = max(number for number in committed if str(number % 3) == document_id)
            assert set(known) == {"a", "b"}
            assert known["a"].fingerprint == known["b"].fingerprint
            assert int(known["a"].fingerprint) >= newest
        assert not list(output.parent.rglob(".tmp-*"))
        assert not list(output.parent.rglob(".bad-*"))
