from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.files.find import find_files
from pipeline.files.tables import DOCUMENTS
from pipeline.inputs.documents import Document, check_documents, stream_documents
from pipeline.job.job import Documents


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def source(path: Path | str, **names: str) -> Documents:
    return Documents(path=str(path), **names)


def message(path: Path | str, *columns: str, **names: str) -> str:
    with pytest.raises(InputError) as caught:
        check_documents(source(path, **names), columns)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


def test_documents_come_in_the_order_of_files_and_rows(tmp_path: Path) -> None:
    write(tmp_path / "d" / "b.parquet", id=["3"], text=["C"])
    write(tmp_path / "d" / "a.parquet", id=["2", "1"], text=["A", "B"])
    write(tmp_path / "d" / ".hidden.parquet", id=["9"], text=["no"])
    (tmp_path / "d" / "notes.rtf").write_text("no")
    for path in (tmp_path / "d", tmp_path / "d" / "*.parquet", tmp_path / "**" / "*.parquet"):
        assert check_documents(source(path)) == 3
        files = find_files(str(path), "documents.path", DOCUMENTS).files
        assert [file.id.rpartition("/")[2] for file in files] == ["a.parquet", "b.parquet"]
        assert [(d.id, d.text) for d in stream_documents(source(path))] == [("2", "A"), ("1", "B"), ("3", "C")]


def test_only_the_needed_columns_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", key=[7], body=["x"], title=["t"], other=["o"])
    names = {"id": "key", "text": "body"}
    assert check_documents(source(path, **names), ["title"]) == 1
    assert list(stream_documents(source(path, **names), ["title"])) == [
        Document("7", "x", {"key": 7, "body": "x", "title": "t"})
    ]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "[a].parquet", id=["1"], text=["x"])
    assert check_documents(source(path)) == 1


def test_blank_texts_are_documents_without_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", id=["1", "2", "3", "4"], text=[None, "", " \n", "x"])
    assert check_documents(source(path)) == 4
    assert [d.text for d in stream_documents(source(path))] == ["", "", "", "x"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_every_kind_of_text_column_is_text(tmp_path: Path, kind: Any) -> None:
    path = write(tmp_path / "a.parquet", id=pa.array(["1"], kind), text=pa.array(["é"], kind))
    assert check_documents(source(path)) == 1
    assert [(d.id, d.text) for d in stream_documents(source(path))] == [("1", "é")]


def test_broken_utf8_makes_a_document_unreadable(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a\xffb", b"c"], pa.binary()).buffers())
    path = write(tmp_path / "a.parquet", id=["1", "2"], text=broken)
    assert [(d.text, d.unreadable) for d in stream_documents(source(path))] == [
        (
            "",
            f"the column 'text' in row 0 (from 0) of {path} is not text in UTF-8: the byte 0xff at offset 1 does not "
            "decode, counted from the beginning of the value",
        ),
        ("c", ""),
    ]


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "minutes.parquet", id=["1"], text=["x"])
    assert "does not exist; did you mean 'minutes.parquet'?" in message(tmp_path / "minute.parquet")
    assert "does not exist" in message(tmp_path / "no" / "such.parquet")


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no file of the formats that are read: Parquet (*.parquet), JSON Lines (" in message(
        tmp_path / "empty"
    )
    assert "no file matches" in message(tmp_path / "x*.parquet")
    path = write(tmp_path / "a.parquet", id=pa.array([], pa.string()), text=pa.array([], pa.string()))
    assert "no documents: 1 file at" in message(path)


def test_what_is_not_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("id,text\n1,x\n")
    assert message(path).startswith(f"{path}: cannot be read as Parquet: ")
    path.write_bytes(b"")
    assert message(path).startswith(f"{path}: cannot be read as Parquet: ")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", id=["1", "2"], text=["x" * 5000, "y" * 5000])
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    assert message(path).startswith(f"{path}: cannot be read")


def test_a_missing_column_names_the_file_and_the_nearest_column(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", id=["1"], text=["x"], title=["t"])
    bad = write(tmp_path / "b.parquet", id=["2"], txt=["x"], title=["t"])
    expected = f"documents.text names the column 'text', which {bad} lacks; did you mean 'txt'?"
    assert message(tmp_path) == expected
    text = message(tmp_path / "a.parquet", "titel")
    assert text.startswith("the prompt uses the column 'titel'")
    assert text.endswith("did you mean 'title'?")
    assert "documents.id names the column 'key'" in message(tmp_path / "a.parquet", id="key")


def test_columns_of_a_wrong_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", id=[1.5], text=["x"])
    assert "is double; expected text or whole numbers" in message(path)
    path = write(tmp_path / "b.parquet", id=["1"], text=[1])
    assert "is int64; expected text" in message(path)
    table = pa.Table.from_arrays([pa.array(["1"])] * 3, names=["id", "text", "text"])
    pq.write_table(table, tmp_path / "c.parquet")
    assert "has 2 times" in message(tmp_path / "c.parquet")


def test_a_duplicate_id_names_both_places(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", id=["x", "1"], text=["x", "x"])
    second = write(tmp_path / "b.parquet", id=[7, 8, 1], text=["x", "x", "x"])
    text = message(tmp_path)
    assert "the id '1' is given twice, in row 1 (from 0)" in text
    assert f"of {first} and in row 2 (from 0) of {second}" in text


@pytest.mark.parametrize("missing", [None, ""])
def test_an_empty_id_names_its_row(tmp_path: Path, missing: str | None) -> None:
    path = write(tmp_path / "a.parquet", id=["1", missing], text=["x", "y"])
    assert message(path) == f"documents.id: the id is empty in row 1 (from 0) of {path}, column 'id'"


_MEASURE = """
import resource, sys
from pathlib import Path
from pipeline.inputs.documents import stream_documents
from pipeline.job.job import Documents

def peak():
    if sys.platform == "linux":  # whose ru_maxrss counts the parent process too
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
characters = sum(len(d.text) for d in stream_documents(Documents(path=sys.argv[1])))
print(characters, peak() - before)
"""


def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    """One row group of 200 MB that hardly compresses, streamed in less than 150 MB (measured: 112)."""
    path = tmp_path / "a.parquet"
    count, length = 10_000, 20_000
    random = Random(0)
    pool = random.randbytes(4_000_000).translate(bytes(i % 94 + 33 for i in range(256))).decode("ascii")
    starts = [random.randrange(len(pool) - length) for _ in range(count)]
    texts = [pool[start : start + length] for start in starts]
    pq.write_table(pa.table({"id": list(range(count)), "text": texts}), path, row_group_size=count)
    assert path.stat().st_size > 150_000_000
    assert pq.ParquetFile(path).metadata.num_row_groups == 1
    result = subprocess.run([sys.executable, "-c", _MEASURE, str(path)], capture_output=True, text=True, check=True)
    characters, peak = map(int, result.stdout.split())
    assert characters == count * length
    assert peak < 150_000_000


@pytest.mark.parametrize("pattern", ["", "/*.txt", "/**/*.txt"])
def test_links_in_a_folder_are_followed_unless_the_job_says_no(tmp_path: Path, pattern: str) -> None:
    folder, outside = tmp_path / "linked", tmp_path / "outside"
    for place in (tmp_path / "real", outside, tmp_path / "real" / "sub"):
        place.mkdir()
        (place / f"{place.name}.txt").write_text("A text.")
    folder.symlink_to(tmp_path / "real")  # the user names this link
    (folder / "secret.txt").symlink_to(outside / "outside.txt")
    (folder / "away").symlink_to(outside)
    found = {"real.txt", "secret.txt"} | ({"sub/sub.txt", "away/outside.txt"} if "**" in pattern else set())
    path = f"{folder}{pattern}"
    assert {document.id for document in stream_documents(Documents(path=path))} == found
    kept = {document.id for document in stream_documents(Documents(path=path, follow_links=False))}
    assert kept == found - {"secret.txt", "away/outside.txt"}
    named = Documents(path=str(folder / "secret.txt"), follow_links=False)
    assert [document.id for document in stream_documents(named)] == ["secret.txt"]


def test_a_folder_of_links_only_is_empty_without_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "b.md")
    (tmp_path / "b.md").write_text("A text.")
    with pytest.raises(InputError, match="no file matches"):
        check_documents(Documents(path=str(tmp_path / "*.txt"), follow_links=False))
