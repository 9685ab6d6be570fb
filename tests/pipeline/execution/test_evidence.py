"""Evidence, choices, samples and log-probabilities, from the job file to the result."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import JobError
from pipeline.execution.decode import chosen_logprobs
from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import PromptTokenizer, Renderer
from pipeline.job.job import Documents, Prompt
from pipeline.models.choices import ForcedTokens
from pipeline.models.loading import load_model
from pipeline.models.quotations import located
from pipeline.models.row_generator import Response
from tests.pipeline.workplace import Workplace

_SCHEMA = {
    "type": "object",
    "properties": {
        "sure": {"type": "boolean"},
        "quote": {"type": "string", "x-evidence": True},
        "parts": {
            "type": "array",
            "minItems": 2,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {"where": {"x-evidence": True}, "n": {"type": "integer", "minimum": 1, "maximum": 5}},
                "required": ["where", "n"],
            },
        },
    },
    "required": ["sure", "quote", "parts"],
}


def _check_evidence(row: dict[str, Any], text: str) -> int:
    """Assert that all quotations of a row are at their places; return how many there are."""
    for quotation in row["evidence"] or []:
        assert text[quotation["start"] : quotation["end"]] == quotation["quote"]
        assert 1 <= quotation["occurrences"] <= text.count(quotation["quote"])
        assert quotation["page"] is None
    return len(row["evidence"] or [])


@pytest.mark.parametrize(
    ("quote", "text", "start", "place", "occurrences"),
    [
        ("no", "It is not now, and there is no cat, no dog.", 0, 28, 2),  # not in "not", where its letters are first
        ("no", "It is not now, and there is no cat, no dog.", 30, 36, 2),
        ("no", "nothing is noted", 0, 0, 2),
        ("(no", "not (no) (none)", 0, 4, 1),
        ("首都", "東京都は日本の首都です。首都。", 0, 7, 2),
    ],
)
def test_a_quotation_is_found_in_whole_words(quote: str, text: str, start: int, place: int, occurrences: int) -> None:
    found = located(quote, text, start)
    assert (found["start"], found["end"], found["occurrences"]) == (place, place + len(quote), occurrences)


def test_every_quotation_is_at_its_place_in_the_document(workplace: Workplace) -> None:
    for query in workplace.queries:
        query["evidence"] = 2
    workplace.documents["d2"] = '東京都は日本の首都です。 大阪は違います。 🙂 «quoted \\ "text"»\n' * 3
    workplace.run()
    rows = workplace.rows()
    assert {row["status"] for row in rows.values()} == {"ok"}
    found = {pair: _check_evidence(row, workplace.documents[pair[0]]) for pair, row in rows.items()}
    assert sum(found.values()) > 0
    assert max(found.values()) <= 2


def test_evidence_changes_no_answer(workplace: Workplace) -> None:
    workplace.run()
    plain = workplace.answers()
    for query in workplace.queries:
        query["evidence"] = True
    assert workplace.run().rows_answered == 9
    assert workplace.answers() == plain


def test_fields_of_a_schema_are_quotations(workplace: Workplace) -> None:
    workplace.queries = [{"id": "q", "text": "What?", "json_schema": _SCHEMA, "max_tokens": 200}]
    workplace.run()
    for (document_id, _), row in workplace.rows().items():
        assert row["status"] == "ok"
        answer = json.loads(row["answer_json"])
        assert list(answer) == ["parts", "quote", "sure"]  # the order of the job file
        assert [list(part) for part in answer["parts"]] == [["n", "where"]] * 2
        quotes = [answer["quote"], *(part["where"] for part in answer["parts"])]
        text = workplace.documents[document_id]
        assert all(quote is None or quote in text for quote in quotes)
        _check_evidence(row, text)
        assert {quotation["quote"] for quotation in row["evidence"] or []} == set(quotes) - {None}


def test_evidence_is_the_same_restored_alone_and_in_batches(workplace: Workplace) -> None:
    for query in workplace.queries:
        query |= {"evidence": True}
    workplace.run()
    expected = {pair: (row["answer"], row["evidence"]) for pair, row in workplace.rows().items()}
    for size in (1, 8):
        workplace.output.unlink()
        assert workplace.run(f"generation.batch_size={size}").prefixes_restored == 3
        assert {pair: (row["answer"], row["evidence"]) for pair, row in workplace.rows().items()} == expected


def test_a_split_document_quotes_with_places_in_the_whole_text(workplace: Workplace) -> None:
    text = " ".join(f"Sentence {number} is about the budget of the year {1900 + number}." for number in range(100))
    workplace.documents = {"long": text}
    workplace.queries = [
        {"id": "q", "text": "What?", "evidence": 2, "max_tokens": 5},
        {"id": "json", "text": "What?", "json_schema": _SCHEMA, "max_tokens": 200},
    ]
    report = workplace.run_with(documents={"path": "docs.parquet", "too_long": "split"})
    assert (report.rows_failed, report.documents_split) == (0, 1)
    rows = workplace.rows()
    assert _check_evidence(rows["long", "q"], text) + _check_evidence(rows["long", "json"], text) > 0


@pytest.fixture
def exact(workplace: Workplace) -> Workplace:
    """Nothing is compressed, so that answers are those of the model without our caches."""
    workplace.tree["cache"] |= {"key_bits": 16, "value_bits": 16}
    return workplace


def _logprobs(workplace: Workplace, document_id: str, query: str, continuation: str) -> list[float]:
    """Return the log-probabilities of a continuation's tokens, by one forward pass of the model without our caches."""
    loaded = load_model(str(workplace.model))
    documents = Documents(path="docs.parquet")
    row = {"id": document_id, "text": workplace.documents[document_id]}
    rendered = Renderer(Prompt(), documents).render(Document(document_id, row["text"], row))
    prompt = loaded.tokenizer.encode(
        PromptTokenizer(loaded.tokenizer).prompt_text(rendered, query), add_special_tokens=False
    )
    tokens = loaded.tokenizer.encode(continuation, add_special_tokens=False)
    logits = loaded.model(mx.array([*prompt, *tokens])[None])[0].astype(mx.float32)
    logprobs = nn.log_softmax(logits, axis=-1)
    return [logprobs[len(prompt) - 1 + number, token].item() for number, token in enumerate(tokens)]


def test_the_probabilities_of_choices_are_those_of_full_forward_passes(exact: Workplace) -> None:
    choices = ["yes", "no", "not stated"]
    exact.queries = [{"id": "q", "text": "Is it?", "choices": choices}]
    exact.run()
    for (document_id, _), row in exact.rows().items():
        shares = dict(row["choice_probabilities"])
        scores = [sum(_logprobs(exact, document_id, "Is it?", choice)) for choice in choices]
        likelihoods = np.exp(scores)
        likelihoods[1] -= likelihoods[2]  # the tokens of "no" are the beginning of those of "not stated"
        expected = [*(likelihoods / likelihoods.sum())]
        assert list(shares.values()) == pytest.approx(expected, abs=1e-4)
        assert row["answer"] == max(shares, key=lambda choice: shares[choice])


def test_log_probabilities_are_those_of_the_answers_tokens(exact: Workplace) -> None:
    exact.queries = [{"id": "q", "text": "Is it?", "choices": ["perhaps", "certainly"]}]
    exact.run()
    for (document_id, _), row in exact.rows().items():
        expected = _logprobs(exact, document_id, "Is it?", row["answer"])
        assert row["logprob_mean"] == pytest.approx(np.mean(expected), abs=1e-3)
        assert row["logprob_min"] == pytest.approx(min(expected), abs=1e-3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_log_probabilities_of_a_step_of_free_and_held_rows(dtype: mx.Dtype) -> None:
    logits = (4 * mx.random.normal((5, 300), key=mx.random.key(1))).astype(dtype)
    tokens, held = [7, 0, 299, 40, 7], {1, 4}
    constraints = [ForcedTokens([token]) if row in held else None for row, token in enumerate(tokens)]
    rounded = logits - mx.logsumexp(logits, axis=-1, keepdims=True)  # as mlx-lm does
    expected = [
        nn.log_softmax((logits if row in held else rounded)[row].astype(mx.float32))[token].item()
        for row, token in enumerate(tokens)
    ]
    for row, constraint in enumerate(constraints):
        if constraint:
            rounded[row] = constraint(mx.array([1]), logits[row : row + 1])[0]
    responses = [Response(row, token, rounded[row], None) for row, token in enumerate(tokens)]
    parsers: Any = [SimpleNamespace(constraint=constraint) for constraint in constraints]
    np.testing.assert_allclose(chosen_logprobs(responses, parsers), expected, rtol=0, atol=1e-5)


def test_masks_temperature_and_top_p_change_no_log_probability(workplace: Workplace) -> None:
    workplace.queries = [{"id": "free", "text": "What?", "max_tokens": 1, "temperature": 5.0}]
    workplace.queries.append({"id": "held", "text": "What?", "json_schema": {"const": True}, "max_tokens": 20})
    workplace.run()
    rows = workplace.rows()
    for document_id in workplace.documents:
        held = rows[document_id, "held"]
        assert held["answer"] == "true"
        assert held["logprob_mean"] < -0.1  # the schema allows one answer only, and the model would not have given it
        assert rows[document_id, "free"]["logprob_mean"] < 0


def test_samples_come_with_their_agreement(workplace: Workplace) -> None:
    workplace.queries = [{"id": "q", "text": "What?", "samples": 4, "temperature": 1.5, "max_tokens": 4}]
    workplace.run()
    for row in workplace.rows().values():
        assert len(row["samples"]) == 4
        assert row["answer"] in row["samples"]
        assert row["agreement"] in {0.25, 0.5, 0.75, 1.0}
    assert len({text for row in workplace.rows().values() for text in row["samples"]}) > 1


def test_rows_of_an_older_result_are_kept(workplace: Workplace) -> None:
    workplace.run()
    table = pq.read_table(workplace.output)
    older = table.select(table.column_names[: table.column_names.index("fingerprint") + 1])
    pq.write_table(older, workplace.output, write_page_checksum=True)
    workplace.queries.append({"id": "more", "text": "And what else?"})
    report = workplace.run()
    assert (report.rows_kept, report.rows_answered) == (9, 3)
    rows = workplace.rows()
    assert rows["d0", "what"]["logprob_mean"] is None
    assert rows["d0", "more"]["logprob_mean"] <= 0
    assert pa.types.is_map(pq.read_schema(workplace.output).field("choice_probabilities").type)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"choices": ["yes"]}, "choices"),
        ({"choices": ["yes", "yes"]}, "has a choice twice"),
        ({"choices": ["yes", "no"], "stop": ["."]}, "both choices and stop"),
        ({"choices": ["yes", "no"], "json_schema": {}}, "both choices and json_schema"),
        ({"choices": ["yes", "no"], "samples": 2}, "both choices and samples"),
        ({"samples": 2}, "temperature"),
        ({"evidence": -1}, "evidence"),
    ],
)
def test_settings_that_do_not_fit_are_refused(workplace: Workplace, query: dict[str, Any], message: str) -> None:
    workplace.queries = [{"id": "q", "text": "What?"} | query]
    with pytest.raises(JobError, match=message):
        workplace.run()
