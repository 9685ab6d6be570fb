"""What is made of generated tokens: an answer, the thinking before it, and where they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from pipeline.job.job import Settings, ThinkingMode
from pipeline.models.output_parser import Answer, OutputParser

TEXT = "The board met. What? When? Who?"


@pytest.fixture(scope="session")
def thinker(make_tokenizer: Callable[..., Any]) -> TokenizerWrapper:
    """A tokenizer that has marks for thinking."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    return TokenizerWrapper(tokenizer)


def read(
    tokenizer: TokenizerWrapper,
    tokens: Sequence[int],
    prompt: str = "<|assistant|>",
    stop: tuple[str, ...] = (),
    thinking: ThinkingMode = "keep",
) -> Answer:
    """Read tokens that end by themselves."""
    asked = Settings(100, 0.0, 1.0, 0, stop, thinking=thinking)
    reading = OutputParser(tokenizer).start_row(tokenizer.encode(prompt, add_special_tokens=False), asked)
    for token in tokens:
        if reading.add(token, -0.5):
            break
    answer = reading.answer("stop")
    assert set(answer.logprobs) <= {-0.5}
    return replace(answer, generated=(), logprobs=())


def encode(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_an_answer_ends_at_a_stop_string(tokenizer: Any) -> None:
    wrapped = TokenizerWrapper(tokenizer)
    tokens = encode(wrapped, TEXT)
    cut = read(wrapped, tokens, stop=("When",))
    assert cut.text == "The board met. What?"
    assert cut.tokens < len(tokens)
    assert read(wrapped, tokens) == Answer(TEXT, "stop", len(tokens))


@pytest.mark.parametrize("stop", ["<|end|>", "<|end|>\n", "met.<|end|>", "met. What?<|end|><|user|>"])
def test_a_stop_string_may_hold_special_tokens(tokenizer: Any, stop: str) -> None:
    """Each of these stands in the text at its place or a part of it does; an answer is never given their texts."""
    wrapped = TokenizerWrapper(tokenizer)
    tokens = encode(wrapped, f"<|user|>The board met. What?{stop} When?")
    cut = read(wrapped, tokens, stop=("nowhere", stop))
    assert cut.text == "The board met. What?"
    assert cut.tokens < len(tokens)
    assert read(wrapped, tokens, stop=("<|system|>",)).text == read(wrapped, tokens).text


def test_a_stop_string_that_spells_a_special_token_is_found_too(make_tokenizer: Callable[..., Any]) -> None:
    wrapped = TokenizerWrapper(make_tokenizer())
    tokens = [*encode(wrapped, "The board met.<"), *encode(wrapped, "|end|> When?")]
    assert read(wrapped, tokens, stop=("<|end|>",)).text == "The board met."


def test_thinking_is_no_part_of_the_answer(thinker: TokenizerWrapper) -> None:
    tokens = encode(thinker, "<think>\nWhat? When?\n</think>\n\nThe board met.")
    assert read(thinker, tokens) == Answer("The board met.", "stop", len(tokens), "What? When?")
    for thinking in (False, "drop"):
        assert read(thinker, tokens, thinking=thinking) == Answer("The board met.", "stop", len(tokens))


@pytest.mark.parametrize("behind", ["", "\n", "\n\n"])
def test_a_template_may_have_begun_the_thinking(thinker: TokenizerWrapper, behind: str) -> None:
    tokens = encode(thinker, "What? When?</think>The board met.")
    answer = read(thinker, tokens, prompt=f"<think>Who?</think><|assistant|><think>{behind}")
    assert (answer.text, answer.thinking) == ("The board met.", "What? When?")


def test_a_template_may_have_ended_the_thinking(thinker: TokenizerWrapper) -> None:
    answer = read(thinker, encode(thinker, "The board met."), prompt="<|assistant|><think>\n\n</think>\n\n")
    assert (answer.text, answer.thinking, answer.failure) == ("The board met.", None, None)


def test_thinking_without_an_end_is_no_answer(thinker: TokenizerWrapper) -> None:
    answer = read(thinker, encode(thinker, "<think>What? When?"))
    assert (answer.text, answer.thinking) == ("", "What? When?")
    assert answer.failure is not None
    assert answer.failure.error_type == "AnswerCutOff"
    assert "had not ended its thinking after" in str(answer.failure)


def test_stop_strings_are_looked_for_in_the_answer_alone(thinker: TokenizerWrapper) -> None:
    tokens = encode(thinker, "<think>When? Who?</think>The board met. When? Who?")
    answer = read(thinker, tokens, stop=("When",))
    assert (answer.text, answer.thinking) == ("The board met.", "When? Who?")


def test_marks_of_several_tokens(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|channel>", "<channel|>"])
    wrapped = TokenizerWrapper(tokenizer)
    assert len(wrapped.think_start_tokens) > 1
    answer = read(wrapped, encode(wrapped, "<|channel>thought\nWhat?<channel|>The board met."))
    assert (answer.text, answer.thinking) == ("The board met.", "What?")
    other = read(wrapped, encode(wrapped, "<|channel>The board met."))
    assert (other.text, other.thinking) == ("<|channel>The board met.", None)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(thought=st.none() | st.text("ab .?\n<", max_size=20), text=st.text("ab .?\n<", max_size=20))
def test_the_two_parts_are_what_was_written(thinker: TokenizerWrapper, thought: str | None, text: str) -> None:
    written = text if thought is None else f"<think>{thought}</think>{text}"
    answer = read(thinker, encode(thinker, written))
    assert (answer.text, answer.thinking) == (text.strip(), (thought or "").strip() or None)


# ---- channels and calls of tools


ANALYSIS = "<|channel|>analysis<|message|>What? When?<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>The board met."
CALL = "<|start|>assistant to=functions.find<|channel|>commentary <|constrain|>json<|message|>Who?<|call|>"
COMMENT = "<|start|>assistant<|channel|>commentary<|message|>Who?<|end|>"


@pytest.fixture(scope="session")
def channels(make_tokenizer: Callable[..., Any]) -> TokenizerWrapper:
    """A tokenizer with the marks of gpt-oss."""
    tokenizer = make_tokenizer()
    marks = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|return|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    return TokenizerWrapper(tokenizer)


@pytest.mark.parametrize(
    ("written", "answer", "thinking"),
    [
        (ANALYSIS + FINAL, "The board met.", "What? When?"),
        (ANALYSIS + FINAL + "<|return|>", "The board met.", "What? When?"),
        (ANALYSIS + FINAL + "<|end|>" + CALL, "The board met.", "What? When?\n\nWho?"),
        (ANALYSIS + COMMENT + FINAL, "The board met.", "What? When?\n\nWho?"),
        (ANALYSIS + CALL + FINAL, "The board met.", "What? When?\n\nWho?"),
        ("<|channel|>final<|message|>The board met.", "The board met.", None),
        ("<|message|>The board met.", "The board met.", None),
        ("<|channel|>final <|constrain|>json<|message|>The board met.", "The board met.", None),
        ("The board met.", "The board met.", None),
        ("The board met.<|end|><|start|>user<|message|>Who?", "The board met.Who?", None),
    ],
)
@pytest.mark.parametrize("prompt", ["<|start|>user<|message|>Who?<|end|><|start|>assistant", "<|assistant|>"])
def test_only_the_final_channel_is_the_answer(
    channels: TokenizerWrapper, prompt: str, written: str, answer: str, thinking: str | None
) -> None:
    tokens = encode(channels, written)
    assert read(channels, tokens, prompt=prompt) == Answer(answer, "stop", len(tokens), thinking)
    assert read(channels, tokens, prompt=prompt, thinking=False) == Answer(answer, "stop", len(tokens))


def test_a_template_may_have_begun_a_channel(channels: TokenizerWrapper) -> None:
    answer = read(channels, encode(channels, "The board met."), prompt="<|start|>assistant<|channel|>final<|message|>")
    assert (answer.text, answer.thinking, answer.failure) == ("The board met.", None, None)
    begun = "<|start|>assistant<|channel|>analysis<|message|>"
    answer = read(channels, encode(channels, "What?<|end|>" + FINAL), prompt=begun)
    assert (answer.text, answer.thinking, answer.failure) == ("The board met.", "What?", None)


@pytest.mark.parametrize("written", [ANALYSIS, ANALYSIS[:-9], "<|channel|>analysis", ANALYSIS + CALL])
def test_channels_without_a_final_one_are_no_answer(channels: TokenizerWrapper, written: str) -> None:
    answer = read(channels, encode(channels, written), prompt="<|start|>assistant")
    assert answer.text == ""
    assert answer.failure is not None
    assert answer.failure.error_type == "AnswerCutOff"


def test_a_stop_string_in_the_final_channel_ends_the_answer(channels: TokenizerWrapper) -> None:
    tokens = encode(channels, ANALYSIS + FINAL + " When? Who?")
    answer = read(channels, tokens, prompt="<|start|>assistant", stop=("When",))
    assert (answer.text, answer.thinking) == ("The board met.", "What? When?")


def test_a_call_of_a_tool_is_no_answer(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    wrapped = TokenizerWrapper(tokenizer, tool_call_start="<tool_call>", tool_call_end="</tool_call>")
    tokens = encode(wrapped, "The board <tool_call>{1}</tool_call>met.<tool_call>{2}</tool_call>")
    assert read(wrapped, tokens) == Answer("The board met.", "stop", len(tokens))
    for written in ("<tool_call>{1}</tool_call>", "<tool_call>{1}"):
        failure = read(wrapped, encode(wrapped, written)).failure
        assert failure is not None
        assert "called a tool in place of an answer" in str(failure)


def test_log_probabilities_are_those_of_the_answers_tokens(channels: TokenizerWrapper) -> None:
    tokens = encode(channels, ANALYSIS + FINAL + "<|end|>" + CALL)
    row = OutputParser(channels).start_row(encode(channels, "<|start|>assistant"), Settings(100, 0.0, 1.0, 0))
    for place, token in enumerate(tokens):
        row.add(token, float(place))
    answer = row.answer("stop")
    assert [tokens[int(place)] for place in answer.logprobs] == encode(channels, "The board met.")
