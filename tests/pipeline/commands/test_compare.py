"""`compare`: two results beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.output.results import Results
from pipeline.output.rows import Row
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.commands.test_score import HOSTILE, failed, ok


def write(path: Path, rows: list[Row], **metadata: str) -> Path:
    own: dict[str, list[Row]] = {}
    for row in rows:
        own.setdefault(row.document_id, []).append(row)
    with Results(path, metadata) as results:
        results.commit(own)
        results.finish((document_id, [row.query_id for row in each]) for document_id, each in own.items())
    return path


@pytest.fixture
def a(tmp_path: Path) -> Path:
    rows = [ok("d0", "q", "Yes."), ok("d1", "q", "no"), failed("d2", "q"), ok("d3", "q", "yes"), ok("d4", "r", "x")]
    return write(
        tmp_path / "a.parquet",
        rows,
        model="one",
        codec='{"key_bits": 4, "value_bits": 4}',
        queries='[{"id": "q", "text": "Is it?"}]',
    )


@pytest.fixture
def b(tmp_path: Path) -> Path:
    cut = Row("d3", "q", "ok", "0", answer=HOSTILE, finish_reason="length", answer_tokens=7)
    rows = [ok("d0", "q", "yes"), ok("d1", "q", "no"), ok("d2", "q", "no"), cut]
    return write(
        tmp_path / "b.parquet",
        rows,
        model="two",
        codec='{"key_bits": 16, "value_bits": 4}',
        queries='[{"id": "q", "text": "Is it so?"}]',
    )


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    """A is right about d0, d1 and d3; B about d0, d1 and d2."""
    right = [("d0", "yes"), ("d1", "no"), ("d2", "no"), ("d3", "yes")]
    rows = ({"document_id": document, "query_id": "q", "answer": answer} for document, answer in right)
    (tmp_path / "gold.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "gold.jsonl"


def compared(*arguments: str | Path) -> Any:
    done = invoke("compare", *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_what_made_them_is_compared_by_key(a: Path, b: Path) -> None:
    made = {name: values for name, values in compared(a, b)["made"].items() if "versions" not in name}
    assert made == {
        "codec.key_bits": ["4", "16"],
        "model": ["one", "two"],
        "queries.q.text": ["Is it?", "Is it so?"],
    }


def test_rows_are_counted_and_agreement_is_of_rows_that_both_answered(a: Path, b: Path) -> None:
    comparison = compared(a, b)
    assert comparison["first"] == {"rows": 5, "alone": 1, "failed": 1, "cut": 0, "answer_tokens": 12}
    assert comparison["second"] == {"rows": 4, "alone": 0, "failed": 0, "cut": 1, "answer_tokens": 16}
    assert list(comparison["queries"]) == ["q"]
    agreement = comparison["agreement"]
    assert (agreement["exact"]["mean"], agreement["normalised"]["mean"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert agreement["exact"]["rows"] == 3


def test_every_row_that_differs_is_shown(a: Path, b: Path) -> None:
    differences = {each["document_id"]: each for each in compared(a, b)["differences"]}
    assert list(differences) == ["d0", "d2", "d3", "d4"]
    assert (differences["d0"]["first"], differences["d0"]["second"]) == ("Yes.", "yes")
    assert differences["d2"]["first"] is None
    assert differences["d2"]["first_error"] == "GenerationFailed: the model failed"
    assert differences["d4"]["second_error"] == "no such row"


def test_gold_says_which_is_better(a: Path, b: Path, gold: Path) -> None:
    judged = compared(a, b, "--gold", gold)["gold"]
    assert [judged[name] for name in ("both", "only_first", "only_second", "neither", "p")] == [2, 1, 1, 0, 1]
    assert judged["first_f1"]["mean"] == judged["second_f1"]["mean"] == 0.75
    assert judged["f1_difference"]["mean"] == 0
    assert judged["f1_difference"]["low"] < 0 < judged["f1_difference"]["high"]


def test_a_result_agrees_with_itself(a: Path) -> None:
    comparison = compared(a, a)
    assert comparison["made"] == {}
    assert comparison["differences"] == []
    assert comparison["agreement"]["exact"]["mean"] == 1


def test_hostile_texts_stay_texts(a: Path, b: Path, gold: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = invoke("compare", a, b, "--gold", gold, "--html", page)
    assert done.exit_code == 0, done.output
    assert "document 'd3', query 'q'\n  A     yes\n  B     <script>" in done.stdout
    assert "\x1b" not in done.stdout
    assert "<script" not in page.read_text()
    assert "4 rows differ" in page.read_text()


def test_a_file_that_is_neither_job_nor_result_is_an_error(a: Path, tmp_path: Path) -> None:
    assert "no such job file" in error_of(invoke("compare", a, tmp_path / "b.yaml"))
