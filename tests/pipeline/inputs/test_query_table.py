"""Queries from tables, by the command line: shared ones, and those that each belong to one document."""

from __future__ import annotations

import json
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import warm
from tests.pipeline.command_line import ROOT, error_of, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")

OWN: list[dict[str, Any]] = [
    {"document": "d2", "id": "a", "text": "Who signed?"},
    {"document": "d0", "id": "b", "text": "What did the board decide?", "max_tokens": 3.0},
    {"document": "d2", "id": "b", "text": "When does it end?", "temperature": 0.5, "seed": 7, "top_p": 0.9},
    {"document": "d0", "id": "a", "text": "Why?", "stop": ["\n", "e"]},
    {"document": "d2", "id": "c", "text": "And then?"},
]
SHARED = [{name: value for name, value in row.items() if name != "document"} for row in OWN[2:]]


def write(workplace: Workplace, rows: list[dict[str, Any]], **names: str) -> Path:
    """Write queries and a job that asks them; the job file."""
    columns = ("document", "id", "text", "max_tokens", "temperature", "top_p", "seed", "stop")
    used = [name for name in columns if any(name in row for row in rows)]
    table = pa.Table.from_pylist([{name: row.get(name) for name in used} for row in rows])
    pq.write_table(table, workplace.folder / "asked.parquet")
    workplace.table = {"path": "asked.parquet", **names}
    return workplace.save()


def own(workplace: Workplace, rows: list[dict[str, Any]]) -> Path:
    return write(workplace, rows, document_id="document")


def pairs(workplace: Workplace) -> list[tuple[str, str]]:
    rows = pq.read_table(workplace.output, columns=["document_id", "query_id"]).to_pylist()
    return [(row["document_id"], row["query_id"]) for row in rows]


# ---- what is asked


def test_each_line_of_a_text_file_is_a_question(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    file = workplace.folder / "questions.txt"
    file.write_bytes("\ufeffWho signed?\r\n\n  Wann läuft es ab?  \nWhat of {{ title }}?".encode())
    workplace.table = {"path": "questions.txt"}
    workplace.documents = {"d0": "The board met."}
    assert invoke("run", workplace.save(), "--quiet").exit_code == 0
    assert pairs(workplace) == [("d0", "who-signed"), ("d0", "wann-läuft-es-ab"), ("d0", "what-of-title")]
    (told,) = caplog.messages
    assert told.startswith("queries: the text of 'what-of-title' has {{ title }}, which the model reads as it is; ")
    file.write_text("Who?\n")
    workplace.queries, workplace.table = [{"id": "who", "text": "Who?"}], None
    fingerprints = []
    for table in (None, {"path": "questions.txt"}):
        workplace.table = table
        workplace.run()
        fingerprints.append(workplace.rows()["d0", "who"]["fingerprint"])
    assert fingerprints[0] == fingerprints[1]
    for content, words in ((b"\n \n", "no queries: "), (b"Who?\nwho\n", "'who' is given 2 times"), (b"\xff", "line")):
        file.write_bytes(content)
        expected = "is not text in UTF-8: the byte 0xff at offset 0" if words == "line" else words
        assert expected in error_of(invoke("plan", workplace.job_file))
    assert "lacks; there are: id, text" in error_of(invoke("plan", workplace.job_file, "--set", "queries.text=q"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Who is {{ name }}?", "{{ name }}"),
        ("Who is {name}?", "{name}"),
        ("{% if x %}Who?{% endif %}", "{% if x %}"),
        ('Answer as {"name": "A", "years": {"from": 1}}.', None),
        ("Is {} or {0} or { x } a set?", None),
    ],
)
def test_braces_that_look_like_a_template_are_told(
    workplace: Workplace, caplog: pytest.LogCaptureFixture, text: str, told: str | None
) -> None:
    asked = [{"document": "d2", "id": "a", "text": text}, {"document": "d1", "id": "b", "text": text}]
    workplace.queries = [{"id": "a", "text": text}, {"id": "b", "text": text}, {"id": "c", "text": "Why?"}]
    for make in (workplace.save, lambda: own(workplace, asked)):
        caplog.clear()
        assert invoke("plan", make()).exit_code == 0
        found = [line for line in caplog.messages if "which the model reads as it is" in line]
        beginnings = [f"queries: the text of 'a' and of 1 more has {told}, "] if told else []
        assert len(found) == len(beginnings)
        assert all(line.startswith(start) for line, start in zip(found, beginnings, strict=True))


def test_shared_queries_are_those_of_a_job_file(workplace: Workplace) -> None:
    workplace.queries = SHARED
    workplace.run()
    before = workplace.output.read_bytes()
    job = write(workplace, SHARED)
    result = invoke("run", job, "--json")
    assert json.loads(result.stdout)["rows_kept"] == 9
    assert workplace.output.read_bytes() == before
    assert "queries    3 a document" in invoke("plan", job).stdout


def test_a_document_s_own_queries_are_asked_of_it_alone(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    job = own(workplace, OWN)
    planned = invoke("plan", job)
    assert "documents  2 (" in planned.stdout
    assert "queries    2.5 a document" in planned.stdout
    assert "rows       5: 0 done, 5 to do" in planned.stdout
    assert "2 to build" in planned.stdout
    assert "queries.document_id: 1 of 3 documents have no queries" in caplog.text
    result = invoke("run", job)
    assert "5 answered, 0 kept, 0 failed of 5 (2 documents)" in result.stdout
    # Documents in their order, queries in theirs.
    assert pairs(workplace) == [("d0", "b"), ("d0", "a"), ("d2", "a"), ("d2", "b"), ("d2", "c")]
    assert "5: 5 done, 0 failed, 0 left" in invoke("status", job).stdout
    assert "2 in the store, 0 to build" in invoke("plan", job).stdout
    own_answers = workplace.answers()
    for document, query in own_answers:  # as where each is asked in a job file
        row = next(row for row in OWN if (row["document"], row["id"]) == (document, query))
        assert row.get("max_tokens", 5) >= workplace.rows()[document, query]["answer_tokens"]
    workplace.table = None
    workplace.queries = [
        {key: int(value) if key == "max_tokens" else value for key, value in row.items() if key != "document"}
        for row in OWN
        if row["document"] == "d2"
    ]
    workplace.run()
    assert {query: own_answers["d2", query] for query in "abc"} == {
        query: answer for (document, query), answer in workplace.answers().items() if document == "d2"
    }


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, {"text": "Who has signed?"}),
        (1, {"max_tokens": 4}),
        (2, {"temperature": 0.6}),
        (2, {"seed": 8}),
        (2, {"top_p": 0.8}),
        (3, {"stop": ["\n"]}),
        (4, {"id": "d"}),
    ],
)
def test_a_query_that_changes_is_answered_again(workplace: Workplace, number: int, change: dict[str, Any]) -> None:
    invoke("run", own(workplace, OWN), "--quiet")
    rows = [{**row, **change} if index == number else row for index, row in enumerate(OWN)]
    job = own(workplace, rows)
    assert "5: 4 done, 0 failed, 1 left" in invoke("status", job).stdout
    assert "rows       5: 4 done, 1 to do" in invoke("plan", job).stdout
    report = json.loads(invoke("run", job, "--json", "--prune").stdout)
    assert (report["rows_kept"], report["rows_answered"]) == (4, 1)


def test_order_and_unknown_documents_change_no_answer(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    invoke("run", own(workplace, OWN), "--quiet")
    job = own(workplace, [*OWN[::-1], {"document": "d9", "id": "a", "text": "Who?"}])
    result = invoke("run", job, "--json")
    assert json.loads(result.stdout)["rows_kept"] == 5
    assert "queries.document_id: 'd9' is no document's id, so its queries are left out" in caplog.text
    assert pairs(workplace) == [("d0", "a"), ("d0", "b"), ("d2", "c"), ("d2", "b"), ("d2", "a")]


def test_documents_share_batches_until_their_own_queries_fill_them(workplace: Workplace) -> None:
    workplace.documents |= {f"e{number}": f"Paper {number}." for number in range(5)}
    rows = [{"document": document, "id": "q", "text": "Why?"} for document in workplace.documents]
    job = own(workplace, [*rows, *OWN])
    assert invoke("run", job, "--quiet").exit_code == 0
    together = workplace.answers()
    assert len(together) == 13
    workplace.output.unlink()
    assert invoke("run", job, "--quiet", "--set", "generation.batch_size=1").exit_code == 0
    assert workplace.answers() == together


def test_ids_that_are_numbers_join_ids_that_are_text(workplace: Workplace) -> None:
    workplace.documents = {"7": "The board met.", "8": "It ended."}
    job = own(workplace, [{"document": 8, "id": 1, "text": "Who?"}, {"document": 7, "id": 2, "text": "Who?"}])
    assert invoke("run", job, "--quiet").exit_code == 0
    assert pairs(workplace) == [("7", "2"), ("8", "1")]


def test_queries_from_json_lines(workplace: Workplace) -> None:
    lines = [json.dumps(row) for row in OWN]
    (workplace.folder / "asked.jsonl").write_text("\n".join(lines))
    workplace.table = {"path": "*.jsonl", "document_id": "document"}
    assert invoke("run", workplace.save(), "--quiet").exit_code == 0
    assert len(pairs(workplace)) == 5


def test_a_killed_run_resumes(workplace: Workplace) -> None:
    workplace.documents |= {f"e{number}": f"Paper {number}. " * 20 for number in range(12)}
    job = own(workplace, [{"document": d, "id": q, "text": "Why?"} for q in "ab" for d in workplace.documents])
    process = warm.Popen([sys.executable, "-m", "pipeline.cli", "run", str(job), "--quiet"], cwd=ROOT)
    parts = Path(f"{workplace.output}.parts")
    while len(list(parts.glob("??/*.parquet"))) < 3 and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    report = json.loads(invoke("run", job, "--json").stdout)
    assert report["rows_kept"] >= 4
    assert report["rows_answered"] == 30 - report["rows_kept"] > 0
    resumed = workplace.output.read_bytes()
    workplace.output.unlink()
    invoke("run", job, "--quiet")
    assert workplace.output.read_bytes() == resumed


# ---- what is wrong


@pytest.mark.parametrize(
    ("rows", "names", "words"),
    [
        (OWN, {"document_id": "doc"}, "queries.document_id names the column 'doc', which "),
        (OWN, {"text": "txt"}, "did you mean 'text'?"),
        (OWN, {"document": "x"}, "unknown key 'queries.document'; did you mean 'document_id'?"),
        (OWN, {"path": "nix.parquet"}, "queries.path: "),
        (OWN, {}, "queries: the id 'a' is given 2 times; ids must be unique, at "),
        ([OWN[0], OWN[0]], {"document_id": "document"}, "given twice for the document 'd2', the second time in row 1 "),
        ([{**OWN[0], "document": "x"}], {"document_id": "document"}, "is a document's; there is 'x'"),
        ([{**OWN[0], "document": None}], {"document_id": "document"}, "queries.document_id: the id is empty in row 0 "),
        ([{**OWN[0], "id": ""}], {}, "queries.id: the id is empty in row 0 (from 0) of "),
        ([{**OWN[0], "text": " "}], {}, "queries: text is empty, in row 0 (from 0) of "),
        ([{**OWN[0], "text": None}], {}, "queries: text is empty, in row 0 (from 0) of "),
        ([{**OWN[0], "text": 3}], {}, "queries.text names the column 'text', which in "),
        ([{**OWN[0], "max_tokens": 1.5}], {}, "queries: max_tokens: expected a whole number, got 1.5, in row 0 "),
        ([{**OWN[0], "max_tokens": 0}], {}, "queries: max_tokens: expected at least 1, got 0, in row 0 "),
        ([{**OWN[0], "top_p": 2.0}], {}, "queries: top_p: expected at most 1, got 2, in row 0 "),
        ([{**OWN[0], "temperature": float("nan")}], {}, "queries: temperature: expected "),
        ([{**OWN[0], "stop": "x"}], {}, "queries: stop: expected a list, got 'x', in row 0 "),
        ([{**OWN[0], "stop": [""]}], {}, "queries: stop.0: expected at least 1 character, got '', in row 0 "),
    ],
)
def test_wrong_queries(workplace: Workplace, rows: list[dict[str, Any]], names: dict[str, str], words: str) -> None:
    job = write(workplace, rows, **names)
    for command in ("run", "plan", "status"):
        assert words in error_of(invoke(command, job))
    assert not workplace.output.exists()


def test_a_table_without_rows(workplace: Workplace) -> None:
    schema = pa.schema([(name, pa.string()) for name in ("document", "id", "text")])
    for names, words in (({}, "queries.path: no queries: "), ({"document_id": "document"}, "there are no rows")):
        job = write(workplace, OWN, **names)
        pq.write_table(schema.empty_table(), workplace.folder / "asked.parquet")
        assert words in error_of(invoke("run", job))


def test_a_result_that_would_become_queries_is_refused(workplace: Workplace) -> None:
    job = write(workplace, OWN, path="out/*.parquet")
    assert "would be read as queries by the next run" in error_of(invoke("run", job))


# ---- beside mlx-lm


def test_a_bench_asks_each_document_its_own(workplace: Workplace) -> None:
    job = own(workplace, OWN)
    chosen = ("naive", "pipeline-cold")
    options = [part for name in chosen for part in ("--contender", name)]
    result = invoke("bench", job, *options, "--set", "cache.resident=dense", "--json", "--queries", "2")
    assert result.exit_code == 0, result.output
    assert [row["answers"] for row in json.loads(result.stdout)] == [4, 4]
    result = invoke("bench", job, *options, "--set", "cache.resident=dense", "--json", "--naive-queries", "1")
    assert [row["answers"] for row in json.loads(result.stdout)] == [2, 5]


def test_answers_to_own_queries_are_shown(workplace: Workplace) -> None:
    job = own(workplace, OWN)
    workplace.run()
    shown = [line.split("\t")[:3] for line in invoke("show", job).stdout.splitlines()]
    assert shown == [[document, query, "ok"] for document, query in pairs(workplace)]
    asked = [line.split("\t")[0] for line in invoke("show", job, "--query", "b").stdout.splitlines()]
    assert asked == ["d0", "d2"]
    page = workplace.folder / "page.html"
    assert invoke("show", job, "--html", page).exit_code == 0
    assert page.read_text().count("<th") >= 3  # a, b and c, though no document has all


def test_a_disk_with_no_room_for_queries(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("pipeline.inputs.query_table.temporary_database", full)
    result = invoke("plan", own(workplace, OWN))
    assert result.exit_code == 1
    assert result.stderr == (
        "error: queries cannot be written to a temporary file: database or disk is full; free some space, or set "
        "TMPDIR to a folder on a disk that has space\n"
    )
