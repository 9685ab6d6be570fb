"""Documents as they are, by the command line: formats, which rows are meant, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")

ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": "The board met.", "year": 2019, "lang": "en"},
    {"id": "b", "text": "Le café est fermé.", "year": 2021, "lang": "fr"},
    {"id": "c", "text": "Who signed?", "year": None, "lang": "en"},
    {"id": 4, "text": "When does it end?", "year": 2024, "lang": "en"},
]


def ids(workplace: Workplace) -> list[str]:
    return list(dict.fromkeys(pq.read_table(workplace.output)["document_id"].to_pylist()))


def write_lines(path: Path, lines: list[Any]) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")


@pytest.fixture
def papers(workplace: Workplace) -> Iterator[Path]:
    """An empty folder that the job reads."""
    folder = workplace.folder / "papers"
    folder.mkdir()
    workplace.save(documents={"path": "papers"})
    return folder


# ---- formats


def test_json_lines_are_answered_as_parquet_is(workplace: Workplace, papers: Path) -> None:
    write_lines(papers / "a.jsonl", ["\ufeff" + json.dumps(ROWS[0]), "", ROWS[1]])
    write_lines(papers / "b.jsonl", ROWS[2:])
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 0
    assert ids(workplace) == ["a", "b", "c", "4"]
    before = workplace.output.read_bytes()
    table = pa.Table.from_pylist([{**row, "id": str(row["id"])} for row in ROWS])
    pq.write_table(table, workplace.folder / "rows.parquet")
    result = invoke("run", workplace.job_file, "--json", "--set", f"documents.path={workplace.folder}/rows.parquet")
    assert json.loads(result.stdout)["rows_kept"] == 12
    assert workplace.output.read_bytes() == before


def test_what_json_allows_costs_one_row_at_most(workplace: Workplace, papers: Path) -> None:
    (papers / "a.jsonl").write_bytes(
        b'{"id": "a", "text": "half: \\ud800"}\n{"id": "b"}\n{"id": "c", "text": "bad: \xff", "other": [1e999]}\n'
        b'{"id": "d", "text": "whole: \\ud83d\\ude00", "other": [1e999]}\n{"id": "e", "text": "NUL: \0"}\n'
        b'{"id": "f", "text": "unused: ", "other": "\xff"}\n{"id": "g", "text": "NUL: \\u0000"}\n'
    )
    result = invoke("run", workplace.job_file, "--quiet")
    assert result.exit_code == 3
    unreadable = dict.fromkeys("aceg", "UnreadableText")
    assert {pair[0]: row["error_type"] for pair, row in workplace.rows().items()} == {
        **unreadable,
        "b": "EmptyDocument",
        "d": None,
        "f": None,
    }


def test_texts_are_documents_by_their_paths(workplace: Workplace, papers: Path) -> None:
    (papers / "2024").mkdir()
    (papers / "b.txt").write_text("\ufeffThe board met.")
    (papers / "a.md").write_bytes("# Closed: é".encode())
    (papers / "2024" / "c.MD").write_text("When does it end?")
    (papers / ".d.txt").write_text("hidden")
    (papers / "image.png").write_bytes(b"\x89PNG")
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 0
    assert ids(workplace) == ["a.md", "b.txt"]
    every = f"documents.path='{papers}/**/*.[mM][dD]'"
    assert invoke("run", workplace.job_file, "--quiet", "--prune", "--set", every).exit_code == 0
    assert ids(workplace) == ["2024/c.MD", "a.md"]
    assert invoke("status", workplace.job_file, "--set", f"documents.path={papers}/b.txt").exit_code == 0
    assert invoke("plan", workplace.job_file, "--set", "documents.limit=1").stdout.startswith("documents  1 (")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.rtf": ""}, ", *.feather, *.ipc), text (*.txt, *.md, *.markdown)"),
        (
            {"a.txt": "x", "b.md": "y", "c.jsonl": "{}"},
            "holds 1 JSON Lines file and 2 text files; name the files of one",
        ),
        ({"a.jsonl": '{"id": "a", "text": "x"}\n{"id": "a", "text": "x"}\n'}, "in line 1 of "),
        ({"a.jsonl": '\n{"id": "a", "text": 3}\n'}, "in line 2 of "),
        ({"a.jsonl": '{"id": 1.5, "text": "x"}\n'}, "a.jsonl is 1.5; expected text or whole numbers"),
        ({"a.jsonl": '{"id": "", "text": "x"}\n'}, "the id is empty in line 1 of "),
        ({"a.jsonl": '{"id": "a", "txt": "x"}\n'}, "a.jsonl lacks; did you mean 'txt'?"),
        ({"a.jsonl": '{"id": "a", "text": "x"\n'}, "line 1 of "),
        ({"a.jsonl": "[1]\n"}, "a.jsonl is no JSON object, such as "),
        ({"a.jsonl": "[" * 100_000}, "a.jsonl is not JSON: "),
        ({"a.jsonl": '{"id": ' + "9" * 5000 + "}"}, "a.jsonl is not JSON: "),
        ({"a.jsonl": "\n"}, "no documents: 1 file at "),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_wrong_files(workplace: Workplace, papers: Path, command: str, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (papers / name).write_text(text)
    assert words in error_of(invoke(command, workplace.job_file))
    assert not workplace.output.exists()


def test_a_text_file_has_no_other_columns(workplace: Workplace, papers: Path) -> None:
    (papers / "a.txt").write_text("x")
    line = error_of(invoke("run", workplace.job_file, "--set", "prompt.context='{{ title }} {{ text }}'"))
    assert line == f"the prompt uses the column 'title', which {papers / 'a.txt'} lacks; there are: id, text"


# ---- which rows are meant


@pytest.mark.parametrize(
    ("where", "limit", "expected"),
    [
        ("year >= 2020", None, ["b", "4"]),
        ("year >= 2020 or lang == 'en'", 2, ["a", "b"]),
        ("not year < 2020", None, ["b", "4"]),
        ("lang == 'en' and year is none", None, ["c"]),
        ("id | string in ['4', 'a']", None, ["a", "4"]),
        ("text | length > 14", None, ["b", "4"]),
        ("'café' in text", None, ["b"]),
        (None, 3, ["a", "b", "c"]),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_where_and_limit(
    workplace: Workplace, papers: Path, suffix: str, where: str | None, limit: int | None, expected: list[str]
) -> None:
    if suffix == "jsonl":
        write_lines(papers / "a.jsonl", ROWS)
    else:
        pq.write_table(pa.Table.from_pylist([{**row, "id": str(row["id"])} for row in ROWS]), papers / "a.parquet")
    workplace.save(documents={"path": "papers", "where": where, "limit": limit})
    counted = json.loads(invoke("status", workplace.job_file, "--json").stdout)
    assert counted["documents"] == len(expected)
    if suffix == "jsonl":
        invoke("run", workplace.job_file, "--quiet")
        assert ids(workplace) == expected


def test_where_and_limit_change_no_answer(workplace: Workplace) -> None:
    workplace.run()
    whole = workplace.output.read_bytes()
    assert workplace.run_with(documents={"path": "docs.parquet", "where": "id != 'd1'"}).rows_kept == 6
    assert workplace.run_with(documents={"path": "docs.parquet", "limit": 1}).rows_kept == 3
    workplace.run_with(documents={"path": "docs.parquet"})
    assert workplace.output.read_bytes() == whole


def test_ids_of_rows_that_are_not_meant_may_be_anything(workplace: Workplace, papers: Path) -> None:
    write_lines(papers / "a.jsonl", [{**ROWS[0], "new": False}, {"text": "x", "new": False}, {**ROWS[0], "new": True}])
    workplace.save(documents={"path": "papers", "where": "new"})
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 0
    assert ids(workplace) == ["a"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("where", "year >", "documents.where: "),
        ("where", "year = 2020", "documents.where: chunk after expression: year = 2020"),
        ("where", "id }} {{ text", "documents.where: "),
        ("where", "'a' == 'b'", "documents.where uses no column"),
        ("where", "jear > 2020", "documents.where uses the column 'jear', which "),
        ("where", "lang", "it is 'en'; expected a condition that is true or false"),
        ("where", "lang > 3", "in line 1 of "),
        ("where", "lang.x.y == 3", "in line 1 of "),
        ("where", "id.__class__.__mro__ == 3", "in line 1 of "),
        ("where", "year > 2030", "with no rows for which documents.where is true: year > 2030"),
        ("where", " ", "documents.where is empty"),
        ("where", 3, "documents.where: expected text, got 3"),
        ("limit", 0, "documents.limit: expected at least 1, got 0"),
        ("limit", "all", "documents.limit: expected a whole number, got 'all'"),
    ],
)
def test_a_wrong_where_or_limit(workplace: Workplace, papers: Path, key: str, value: Any, words: str) -> None:
    write_lines(papers / "a.jsonl", ROWS)
    workplace.save(documents={"path": "papers", key: value})
    for command in ("run", "plan", "status"):
        assert words in error_of(invoke(command, workplace.job_file))
