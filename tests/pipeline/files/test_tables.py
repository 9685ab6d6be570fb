"""CSV, TSV, JSON arrays, Arrow, and compressed files: the same documents and queries as Parquet gives."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pytest

from tests import ROOT
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")

ZSTD = pa.Codec("zstd")
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: ZSTD.compress(content, asbytes=True),
}


def as_csv(rows: list[dict[str, Any]], separator: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_arrow(rows: list[dict[str, Any]], is_stream: bool = False) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) if is_stream else pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return bytes(sink.getvalue())


def as_feather(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    feather.write_feather(pa.Table.from_pylist(rows), sink, compression="zstd")
    return bytes(sink.getvalue())


FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".csv": as_csv,
    ".tsv": lambda rows: as_csv(rows, "\t"),
    ".semicolons.csv": lambda rows: as_csv(rows, ";"),
    ".json": lambda rows: json.dumps(rows, indent=2).encode(),
    ".jsonl": lambda rows: "".join(f"{json.dumps(row)}\n" for row in rows).encode(),
    ".arrow": as_arrow,
    ".stream.arrow": lambda rows: as_arrow(rows, is_stream=True),
    ".feather": as_feather,
}
NAMES = [f"d{suffix}{end}" for suffix in FORMATS for end in PACK if not end or suffix in (".csv", ".json", ".jsonl")]


def write(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    suffix = name[1:]
    end = next((end for end in PACK if end and suffix.endswith(end)), "")
    path.joinpath(name).write_bytes(PACK[end](FORMATS[suffix.removesuffix(end)](rows)))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Any:
    place = Workplace(tmp_path_factory.mktemp("parquet"), tiny_model)
    place.run()
    return place.answers(), place.cache


@pytest.mark.parametrize("name", NAMES)
def test_documents_of_each_format_are_answered_as_those_of_parquet(
    workplace: Workplace, name: str, expected: Any
) -> None:
    answers, cache = expected
    write(workplace.folder, name, [{"id": key, "text": text} for key, text in workplace.documents.items()])
    workplace.save(documents={"path": name}, cache={"dir": str(cache)})
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 0
    assert workplace.answers() == answers
    assert workplace.report()["prefixes_restored"] == 3


@pytest.mark.parametrize("name", ["q.csv", "q.json", "q.arrow", "q.csv.gz"])
def test_queries_of_each_format_have_settings(workplace: Workplace, name: str) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "text": "What?", "max_tokens": 3, "choices": None},
        {"id": "b", "text": "Is it?", "max_tokens": None, "choices": ["yes", "no"]},
    ]
    if ".csv" in name:
        rows[1]["choices"] = json.dumps(rows[1]["choices"])
    write(workplace.folder, name, rows)
    workplace.table = {"path": name}
    workplace.save()
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 0
    assert workplace.rows()["d0", "a"]["answer_tokens"] <= 3
    assert workplace.rows()["d0", "b"]["answer"] in ("yes", "no")


def test_a_cell_may_have_commas_quotes_lines_and_more_characters_than_csv_allows(workplace: Workplace) -> None:
    text = 'The "board", it met.\r\nAnd\nmet. ' + "x" * 200_000
    (workplace.folder / "d.csv").write_bytes(b"\xef\xbb\xbf" + as_csv([{"id": "a", "text": text, "note": ""}]))
    workplace.save(documents={"path": "d.csv", "where": "note is none", "too_long": "truncate"})
    shown = invoke("plan", workplace.job_file, "--prompt").stdout
    assert 'The "board", it met.\r\nAnd\nmet.' in shown.replace("\\r", "\r") or 'The "board", it met.' in shown
    assert invoke("plan", workplace.job_file).stdout.startswith("documents  1 (")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", b"id,text\na,The board, it met.\n", "line 2 of {} has 3 cells, and the first line has 2"),
        ("d.csv", b"id,text\na,b\nc\n", "line 3 of {} has 1 cells, and the first line has 2"),
        ("d.csv", b'id,text\na,"b" c\n', "{}: is not CSV: "),
        ("d.csv", b'id,text\na,"b\n', "{}: is not CSV: "),
        ("d.csv", b"id,txt\na,b\n", "the column 'text', which {} lacks; did you mean 'txt'?"),
        ("d.csv", b"id,text,text\na,b,c\n", "which {} has 2 times"),
        ("d.csv", b"", "no documents: 1 file"),
        ("d.csv", b"%PDF-1.7\n", "{}: is not CSV: it is PDF; convert it"),
        ("d.json", b'{"id": "a"}\n', "{}: is no JSON array of objects; if each of its lines is an object"),
        ("d.json", b'[{"id": "a", "text": "b"}', "{}: is no JSON array: it is cut off"),
        ("d.json", b'[{"id": "a", "text": "b"}, {"id": ', "{}: is not JSON: "),
        ("d.json", b'[{"id": "a", "text": "b"} {}]', "{}: is no JSON array: there is '{{}}]' behind an object"),
        ("d.json", b'["a"]', "object 0 (from 0) of {} is no JSON object"),
        ("d.json", b'[{"id": "a", "text": 3}]', "which in object 0 (from 0) of {} is 3; expected text"),
        ("d.json", b"[]", "no documents: 1 file"),
        ("d.json", b"[" * 100_000, "{}: is not JSON: "),
        ("d.jsonl.gz", gzip.compress(b'{"id": "a", "text": "b"}\n' * 9)[:-9], "it is cut off or damaged"),
        ("d.jsonl.gz", b'{"id": "a"}', "not compressed as its suffix says"),
        ("d.txt.zst", b"The board met.", "cut off or damaged"),
        ("d.jsonl.xz", lzma.compress(b"x" * 999)[:-30], "cut off or damaged"),
        ("d.arrow", as_arrow([{"id": "a", "text": "b"}])[:-20], "{}: cannot be read as Arrow: "),
        ("d.arrow", b"nothing of that kind", "{}: cannot be read as Arrow: "),
    ],
)
def test_a_damaged_file_is_an_error_with_its_place(
    workplace: Workplace, name: str, content: bytes, message: str
) -> None:
    (workplace.folder / name).write_bytes(content)
    workplace.save(documents={"path": name})
    assert message.format(workplace.folder / name) in error_of(invoke("plan", workplace.job_file))


@pytest.mark.parametrize("name", ["d.csv", "d.json"])
def test_a_text_that_does_not_decode_costs_one_row(workplace: Workplace, name: str) -> None:
    write(workplace.folder, name, [{"id": "a", "text": "The board met."}, {"id": "b", "text": "XX"}])
    file = workplace.folder / name
    file.write_bytes(file.read_bytes().replace(b"XX", b"caf\xe9"))
    workplace.save(documents={"path": name})
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 3
    assert workplace.rows()["a", "what"]["status"] == "ok"
    assert workplace.rows()["b", "what"]["error_type"] == "UnreadableText"
    workplace.save(documents={"path": name, "encoding": "cp1252"})
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the most memory of a process is read from /proc")
@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz", "d.json", "d.jsonl.zst", "d.arrow"])
def test_memory_does_not_grow_with_the_number_of_documents(tmp_path: Path, name: str) -> None:
    """Six hundred documents of 90 kB are read in the memory of a few of them."""
    write(tmp_path, name, [{"id": f"a{number}", "text": f"{number} " * 20_000} for number in range(600)])
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.job.job import Documents\n"
        "from pipeline.inputs.documents import check_documents, stream_documents\n"
        "def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "Path('/proc/self/clear_refs').write_text('5')\nsource, before = Documents(path=sys.argv[1]), peak()\n"
        "assert check_documents(source) == sum(1 for _ in stream_documents(source)) == 600\n"
        "print((peak() - before) // 1000)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / name)]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    print(name, told.stdout)
    assert int(told.stdout) < 40
