"""The demo: its documents state every fact once, its gold answers are right, and its model reads."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer

from tests import ROOT

JOBS = ROOT / "jobs"
DEMO = JOBS / "demo"
MODEL = DEMO / "model"
sys.path.insert(0, str(DEMO))

import evaluate  # noqa: E402
import minutes  # noqa: E402
import samples  # noqa: E402


@cache
def documents() -> list[dict[str, Any]]:
    return pq.read_table(DEMO / "minutes.parquet").to_pylist()


@cache
def gold() -> list[dict[str, Any]]:
    return pq.read_table(DEMO / "gold.parquet").to_pylist()


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def facts() -> list[dict[str, Any]]:
    return [row for row in gold() if row["query_id"] != minutes.SUMMARY_ID]


def test_the_committed_documents_are_what_the_generator_writes() -> None:
    written, written_gold = minutes.tables(minutes.demo_minutes())
    assert written.to_pylist() == documents()
    assert written_gold.to_pylist() == gold()


def test_every_fact_is_stated_exactly_once() -> None:
    text_of = {document["id"]: document["text"] for document in documents()}
    for row in facts():
        text = text_of[row["document_id"]]
        assert text.count(row["statement"]) == 1
        assert text.count(row["answer"]) == 1
        assert row["answer"] in row["statement"]
        assert row["depth"] == pytest.approx(text.index(row["statement"]) / len(text), abs=1e-4)


def test_decisions_stand_in_the_document_in_the_summary_s_order() -> None:
    text_of = {document["id"]: document["text"] for document in documents()}
    summaries = [row for row in gold() if row["query_id"] == minutes.SUMMARY_ID]
    assert len(summaries) == len(documents())
    for row in summaries:
        decisions = [line.split(". ", 1)[1] for line in row["answer"].splitlines()]
        places = [text_of[row["document_id"]].index(decision) for decision in decisions]
        assert 4 <= len(decisions) <= 6
        assert places == sorted(places)


def test_facts_lie_at_every_depth() -> None:
    fifths = [0] * 5
    for row in facts():
        fifths[int(row["depth"] * 5)] += 1
    assert min(fifths) >= 0.15 * sum(fifths)


def test_documents_are_long() -> None:
    lengths = [len(tokenizer().encode(document["text"]).ids) for document in documents()]
    assert len(lengths) >= 12
    assert min(lengths) >= 4_000
    assert max(lengths) <= 10_000


def test_names_of_the_demo_do_not_occur_in_training() -> None:
    """Nor do its codes and references: they come from a reserved fifth of all."""
    for_training = minutes.write_minutes("a seed", 20_000)
    for_demo = minutes.write_minutes("a seed", 20_000, for_demo=True)
    kinds = ("owner", "opener", "code", "reference")
    assert any(fact.kind in kinds for fact in for_training.facts)
    for document, reserved in ((for_training, False), (for_demo, True)):
        for fact in document.facts:
            if fact.kind in kinds:
                assert minutes.is_reserved(fact.answer) is reserved


def test_the_job_asks_what_the_gold_answers() -> None:
    job = yaml.safe_load((JOBS / "summarize.yaml").read_text())
    assert {query["id"]: query["text"] for query in job["queries"]} == evaluate.questions()
    assert job["prompt"]["system"] == minutes.SYSTEM
    asked = {(document["id"], query["id"]) for document in documents() for query in job["queries"]}
    assert {(row["document_id"], row["query_id"]) for row in gold()} == asked


def test_weights_are_small() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 25_000_000


def test_every_query_has_the_same_context_tokens() -> None:
    for document in documents()[:2]:
        context = samples.context(document["text"])
        context_tokens = tokenizer().encode(context).ids
        for question in evaluate.questions().values():
            tokens = tokenizer().encode(f"{context}{question}{samples.END}\n").ids
            assert tokens[: len(context_tokens)] == context_tokens


def test_an_answer_has_the_tokens_that_its_words_have_in_the_document() -> None:
    for row in facts():
        answer = tokenizer().encode(row["answer"]).tokens
        statement = tokenizer().encode(row["statement"]).tokens
        assert any(
            statement[start : start + len(answer)] == answer for start in range(len(statement) - len(answer) + 1)
        )


def test_the_fast_encoder_encodes_as_the_tokenizer() -> None:
    encode = samples.Encoder(tokenizer())
    for document in documents()[:3]:
        rendered = f"{samples.context(document['text'])}Who owns it?{samples.END}\n"
        assert encode(rendered) == tokenizer().encode(rendered).ids


def test_score_counts_what_is_right() -> None:
    right = {(row["document_id"], row["query_id"]): row["answer"] for row in gold()}
    assert evaluate.score(right, gold()).wrong == ()
    assert evaluate.score({}, gold()).exact.right == 0

    summary = ("minutes-01", minutes.SUMMARY_ID)
    lines = right[summary].splitlines()
    worse = right | {summary: "\n".join(lines[1:]), ("minutes-02", "pilot-owner"): "Nobody"}
    result = evaluate.score(worse, gold())
    assert {key for key, _, _ in result.wrong} == {summary, ("minutes-02", "pilot-owner")}
    assert result.decisions.count - result.decisions.right == 1
    assert result.exact.count - result.exact.right == 1


def test_the_model_finds_a_fact_of_a_new_document() -> None:
    asked = (("code", "archive room"), ("owner", "pilot scheme"))
    document = minutes.write_minutes("short", 1_200, asked, 1, 3, for_demo=True)
    questions = {fact.kind: fact.question for fact in document.facts if (fact.kind, fact.subject) in asked}
    answers = evaluate.uncompressed_answers(MODEL, [{"id": "short", "text": document.text}], questions)
    expected = {fact.kind: fact.answer for fact in document.facts}
    assert {kind: answer for (_, kind), answer in answers} == {kind: expected[kind] for kind in questions}
