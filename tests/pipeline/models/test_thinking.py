"""Models that think before they answer, through whole runs: a script writes their tokens in place of the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.pipeline.workplace import Workplace

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
OPENING = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|><think>\n"
SCHEMA = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}


@pytest.fixture
def thinking_place(
    tmp_path: Path, write_model: Callable[..., Path], make_tokenizer: Callable[..., Any]
) -> Callable[[str], Workplace]:
    """`thinking_place(chat_template)`: one document and one query for a model with marks for thinking."""

    def make(chat_template: str) -> Workplace:
        tokenizer = make_tokenizer(chat_template=chat_template)
        tokenizer.add_tokens(["<think>", "</think>"])
        model = write_model(tmp_path / "model", vocab_size=len(tokenizer))
        tokenizer.save_pretrained(model)
        workplace = Workplace(tmp_path / "work", model)
        workplace.documents = {"d": workplace.documents["d0"]}
        workplace.queries = [{"id": "q", "text": "When?", "max_tokens": 60}]
        workplace.tree["generation"] = {"batch_size": 1}
        return workplace

    return make


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Callable[[Workplace, str], None]:
    """`write(workplace, text)`: what the model writes next; then what it would by itself."""

    def script(workplace: Workplace, text: str) -> None:
        from pipeline.models.loading import load_tokenizer

        tokens = load_tokenizer(workplace.model).encode(text, add_special_tokens=False)

        def make_sampler(*_: Any) -> Callable[[mx.array], mx.array]:
            left: Iterator[int] = iter(tokens)

            def sample(logprobs: mx.array) -> mx.array:
                token = next(left, None)
                return mx.argmax(logprobs, axis=-1) if token is None else mx.array([token])

            return sample

        monkeypatch.setattr("pipeline.execution.decode.make_sampler", make_sampler)

    return script


def the_row(workplace: Workplace) -> dict[str, Any]:
    (row,) = workplace.rows().values()
    return row


def test_thinking_is_kept_or_dropped(thinking_place: Any, write: Any) -> None:
    workplace = thinking_place(TEMPLATE)
    write(workplace, "<think>What? When?</think>In May.<|end|>")
    workplace.run("generation.thinking=keep")
    assert (the_row(workplace)["answer"], the_row(workplace)["thinking"]) == ("In May.", "What? When?")
    assert workplace.run("generation.thinking=keep").rows_kept == 1
    assert workplace.run("generation.thinking=drop").rows_kept == 0
    assert (the_row(workplace)["answer"], the_row(workplace)["thinking"]) == ("In May.", None)


def test_the_template_is_told_whether_to_think(thinking_place: Any, write: Any) -> None:
    workplace = thinking_place(TEMPLATE)
    write(workplace, "In May.<|end|>")
    workplace.run()
    without = the_row(workplace)
    workplace.run("generation.thinking=keep")
    assert the_row(workplace)["query_tokens"] < without["query_tokens"]
    assert the_row(workplace)["context_tokens"] == without["context_tokens"]
    assert len(workplace.segments()) == 1  # what comes before the query is the same


def test_a_model_that_thinks_unasked_answers_without_it(thinking_place: Any, write: Any) -> None:
    workplace = thinking_place(OPENING)
    write(workplace, "What? When?</think>In May.<|end|>")
    workplace.run()
    assert (the_row(workplace)["answer"], the_row(workplace)["thinking"]) == ("In May.", None)


def test_a_row_that_is_cut_off_while_it_thinks_fails(thinking_place: Any, write: Any) -> None:
    workplace = thinking_place(TEMPLATE)
    write(workplace, "<think>" + "What? When? " * 20)
    report = workplace.run("generation.thinking=drop")
    assert report.failures == {"AnswerCutOff": 1}
    assert the_row(workplace)["error"] == "the model had not ended its thinking after 60 tokens; raise max_tokens"


@pytest.mark.parametrize(
    ("template", "text", "thinking", "thought"),
    [
        (TEMPLATE, "<think>What? When?</think>", "keep", "What? When?"),
        (TEMPLATE, "", "keep", None),
        (TEMPLATE, "", False, None),
        (OPENING, "What? When?</think>", False, None),
        (OPENING, "What? When?</think>", "keep", "What? When?"),
    ],
)
def test_a_schema_holds_from_where_thinking_ends(
    thinking_place: Any, write: Any, template: str, text: str, thinking: bool | str, thought: str | None
) -> None:
    pytest.importorskip("llguidance")
    workplace = thinking_place(template)
    workplace.queries[0]["json_schema"] = SCHEMA
    workplace.tree["generation"]["thinking"] = thinking
    write(workplace, text)
    workplace.run()
    row = the_row(workplace)
    assert json.loads(row["answer_json"]).keys() == {"sure"}
    assert row["thinking"] == thought


def test_what_thinking_may_be(workplace: Workplace) -> None:
    from pipeline.errors import JobError

    with pytest.raises(JobError, match=r"generation\.thinking: expected False, 'drop' or 'keep', got true"):
        workplace.run("generation.thinking=on")
