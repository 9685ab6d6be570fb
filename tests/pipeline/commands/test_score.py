"""`score`: answers against gold answers, with scores that were worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.output.results import Results
from pipeline.output.rows import Row
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace

HOSTILE = "<script>document.title = 1</script>\x1b[2J"
SURE = {"yes": 0.95, "no": 0.05}
UNSURE = {"yes": 0.55, "no": 0.45}


def ok(document_id: str, query_id: str, answer: str, **columns: Any) -> Row:
    return Row(document_id, query_id, "ok", "0", answer=answer, finish_reason="stop", answer_tokens=3, **columns)


def failed(document_id: str, query_id: str) -> Row:
    return Row(document_id, query_id, "error", "0", error_type="GenerationFailed", error="the model failed")


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """Two queries on four documents; one row failed, and one was cut off."""
    rows = {
        "a": [ok("a", "term", "The 3rd of May 2029."), ok("a", "signed", "yes", choice_probabilities=SURE)],
        "b": [ok("b", "term", "2 years"), ok("b", "signed", "yes", choice_probabilities=UNSURE)],
        "c": [failed("c", "term"), failed("c", "signed")],
        "e": [Row("e", "term", "ok", "0", answer="no gold", finish_reason="length")],
    }
    with Results(tmp_path / "result.parquet") as results:
        results.commit(rows)
        results.finish((document_id, [row.query_id for row in own]) for document_id, own in rows.items())
    return tmp_path / "result.parquet"


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    """Document d has no row; e has no gold."""
    rows = [
        ("a", "term", "2029-05-03"),
        ("b", "term", "two years"),
        ("c", "term", "one year"),
        ("a", "signed", "Yes"),
        ("b", "signed", "no"),
        ("c", "signed", "no"),
        ("d", "signed", "yes"),
    ]
    lines = (json.dumps(dict(zip(("document_id", "query_id", "answer"), row, strict=True))) for row in rows)
    (tmp_path / "gold.jsonl").write_text("\n".join(lines))
    return tmp_path / "gold.jsonl"


def scored(*arguments: str | Path, code: int = 0) -> Any:
    done = invoke("score", *arguments, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_scores_are_those_worked_out_by_hand(result: Path, gold: Path) -> None:
    scores = scored(result, "--gold", gold)
    every, term, signed = scores["all"], scores["queries"]["term"], scores["queries"]["signed"]
    counts = ("documents", "rows", "answered", "failed", "missing", "cut")
    assert [every[name] for name in counts] == [4, 7, 4, 2, 1, 0]
    assert scores["without_gold"] == 1
    assert {name: each["mean"] for name, each in term["metrics"].items()} == {
        "exact": 0,
        "normalised": 0,
        "f1": pytest.approx(0.5 / 3),  # "years" is one of two words on both sides
        "date": 1,
    }
    assert term["metrics"]["date"]["rows"] == 1
    assert signed["metrics"]["normalised"]["mean"] == 0.25
    assert signed["metrics"]["exact"]["mean"] == 0
    assert every["metrics"]["normalised"]["mean"] == pytest.approx(1 / 7)
    low, high = every["metrics"]["f1"]["low"], every["metrics"]["f1"]["high"]
    assert 0 <= low < every["metrics"]["f1"]["mean"] < high <= 1


def test_choices_have_a_confusion_table_and_calibration(result: Path, gold: Path) -> None:
    signed = scored(result, "--gold", gold)["queries"]["signed"]
    assert [(each["gold"], each["answer"], each["rows"]) for each in signed["confusion"]] == [
        ("no", "yes", 1),
        ("no", None, 1),
        ("yes", "yes", 1),
        ("yes", None, 1),
    ]
    bins = [(each["low"], each["rows"], each["accuracy"]) for each in signed["calibration"]["bins"]]
    assert bins == [(0.5, 1, 0), (0.9, 1, 1)]
    assert signed["calibration"]["error"] == pytest.approx((0.55 + 0.05) / 2)


def test_gold_without_a_row_can_be_left_out(result: Path, gold: Path) -> None:
    every = scored(result, "--gold", gold, "--ignore-missing")["all"]
    assert (every["rows"], every["missing"]) == (6, 0)


@pytest.mark.parametrize(("least", "code"), [("normalised=.14", 0), ("normalised=.15", 3), ("number=.1", 3)])
def test_a_score_below_its_minimum_ends_with_3(result: Path, gold: Path, least: str, code: int) -> None:
    done = invoke("score", result, "--gold", gold, "--min", "exact=0", "--min", least)
    assert done.exit_code == code
    assert ("expected at least" in done.stderr) is (code == 3)
    assert "Rows of the result without gold: 1." in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--min", "exakt=.9"], "there is no metric 'exakt'; did you mean 'exact'?"),
        (["--min", "exact=high"], "--min exact=high: expected METRIC=SHARE"),
        (["--min", "exact=nan"], "--min exact=nan: expected METRIC=SHARE"),
        (["--column", "answers=x"], "--column answers: expected NAME=COLUMN"),
        (["--set", "model=x"], "is a result file, which has no keys"),
    ],
)
def test_options_that_mean_nothing_are_named(result: Path, gold: Path, options: list[str], words: str) -> None:
    assert words in error_of(invoke("score", result, "--gold", gold, *options))


def test_a_job_is_scored_while_it_runs(workplace: Workplace, gold: Path) -> None:
    none = invoke("score", workplace.job_file, "--gold", gold)
    assert none.stderr.endswith(f"there are no answers yet; to get them: pipeline run {workplace.job_file}\n")
    with Results(workplace.output) as results:
        results.commit({"a": [ok("a", "term", "2029-05-03")]})
    for source in (workplace.job_file, workplace.output):
        assert scored(source, "--gold", gold)["all"]["answered"] == 1


def test_evidence_is_scored_by_place(tmp_path: Path) -> None:
    quotation: Any = {"quote": "x" * 10, "start": 5, "end": 15, "occurrences": 1, "page": None}
    with Results(tmp_path / "result.parquet") as results:
        results.commit({"a": [ok("a", "q", "x", evidence=[quotation]), ok("a", "r", "x")]})
        results.finish([("a", ["q", "r"])])
    rows = [{"document_id": "a", "query_id": name, "evidence": [{"start": 0, "end": 10}]} for name in "qr"]
    (tmp_path / "gold.jsonl").write_text("\n".join(json.dumps({**row, "answer": "x"}) for row in rows))
    metrics = scored(tmp_path / "result.parquet", "--gold", tmp_path / "gold.jsonl")["all"]["metrics"]
    assert metrics["evidence_f1"]["mean"] == pytest.approx(0.25)
    assert metrics["evidence_overlap"]["mean"] == 0.5


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    with Results(tmp_path / "result.parquet") as results:
        results.commit({"a": [ok("a", HOSTILE, HOSTILE, choice_probabilities={HOSTILE: 1.0, "no": 0.0})]})
        results.finish([("a", [HOSTILE])])
    (tmp_path / "gold.jsonl").write_text(json.dumps({"document_id": "a", "query_id": HOSTILE, "answer": HOSTILE}))
    page = tmp_path / "page.html"
    done = invoke("score", tmp_path / "result.parquet", "--gold", tmp_path / "gold.jsonl", "--html", page)
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.stdout
    assert "<script" not in page.read_text()
    assert "&lt;script&gt;" in page.read_text()
