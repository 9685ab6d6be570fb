"""A plan's counts against those of a run, which tokenises every prompt whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cache.hit_index import HitIndex, label_number
from pipeline.errors import RowError
from pipeline.inputs.prompts import PromptTokenizer, Rendered
from pipeline.inputs.token_counter import Effort, Lengths, TokenCounter

QUERIES = ("What did the board decide?", "Who signed the contract?", "\n1")
TEXT = "The board met on the third of May and decided the budget. "
NOTHING = Effort(0, 0)


def as_a_run(prompts: PromptTokenizer, rendered: Rendered, queries: Sequence[str] = QUERIES) -> Lengths:
    tokens = prompts.tokenise(rendered, queries)
    return Lengths(len(tokens.context), tuple(len(suffix) for suffix in tokens.suffixes))


def count(
    prompts: PromptTokenizer, documents: Sequence[Rendered], effort: Effort | None = None, rooms: Sequence[int] = ()
) -> list[Lengths]:
    counter = TokenCounter(prompts, len(documents), effort or Effort())
    return [counter.count(rendered, QUERIES, rooms) for rendered in documents]


@pytest.mark.parametrize("chat", [True, False])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["S", None]),
            st.integers(0, 9),
            st.text("aby1é ,.?!\n\t-()<|>", max_size=12)
            | st.sampled_from(["<|end|>", "the end|>", ".\n<|bos|>\n", "日本"]),
        ).map(lambda parts: Rendered(parts[0], f"x{TEXT * parts[1]}{parts[2]}")),
        min_size=1,
        max_size=8,
    )
)
def test_counts_are_those_of_a_run(make_tokenizer: Callable[..., Any], chat: bool, documents: list[Rendered]) -> None:
    prompts = PromptTokenizer(make_tokenizer() if chat else make_tokenizer(chat_template=None))
    assert count(prompts, documents) == [as_a_run(prompts, each) for each in documents]


def test_each_way_to_end_has_its_own_seam(tokenizer: Any) -> None:
    prompts = PromptTokenizer(tokenizer)
    documents = [Rendered(None, TEXT + ending) for ending in ("a", "a\n\n", "a.", "b", "b\n\n", "<|end|>\n\n")]
    expected = [as_a_run(prompts, each) for each in documents]
    assert count(prompts, documents) == expected
    assert len({lengths.suffixes for lengths in expected}) > 1


def test_documents_with_other_queries_have_other_seams(tokenizer: Any) -> None:
    prompts = PromptTokenizer(tokenizer)
    rendered = Rendered(None, TEXT)
    sets = [("Why?",), ("What else is there to be said of it?", "Why?")]
    counter = TokenCounter(prompts, 2, Effort())
    counted = [counter.count(rendered, texts) for texts in sets]
    assert counted == [as_a_run(prompts, rendered, texts) for texts in sets]


def test_a_tokenizer_that_takes_one_text_at_a_time(tokenizer: Any) -> None:
    class Slow:
        chat_template = None

        def encode(self, text: str, **options: Any) -> Any:
            return tokenizer.encode(text.replace("\n", "<n>"), **options)

    prompts = PromptTokenizer(Slow())
    documents = [Rendered(None, TEXT * times) for times in (1, 2, 3)]
    assert count(prompts, documents) == [as_a_run(prompts, each) for each in documents]


def test_beyond_the_effort_documents_are_estimated(tokenizer: Any) -> None:
    prompts = PromptTokenizer(tokenizer)
    documents = [Rendered(None, TEXT * times) for times in (40, 80, 20)]
    first, *others = count(prompts, documents, NOTHING)
    assert first == as_a_run(prompts, documents[0])
    for document, estimate in zip(documents[1:], others, strict=True):
        assert estimate.estimated
        assert estimate.context == pytest.approx(as_a_run(prompts, document).context, rel=0.05)


def test_half_of_the_sample_is_spread_over_all_documents(tokenizer: Any) -> None:
    documents = [Rendered(None, TEXT * 10)] * 100
    lengths = count(PromptTokenizer(tokenizer), documents, Effort(sample=40 * 600, near_limit=0))
    estimated = [each.estimated for each in lengths]
    assert not any(estimated[:9])
    for quarter in range(0, 100, 25):
        assert not all(estimated[quarter : quarter + 25])
    assert 50 < sum(estimated) < 75


def test_what_is_near_the_limit_is_counted_all_the_same(tokenizer: Any) -> None:
    prompts = PromptTokenizer(tokenizer)
    first, near, far = (Rendered(None, text) for text in ("Mixed: éé 1, 2. " * 50, "Mixed: éé 1, 2. " * 60, TEXT))
    exact = as_a_run(prompts, near)
    rooms = (exact.context + max(exact.suffixes),) * 3
    found = count(prompts, [first, near, far], Effort(0, 1 << 20), rooms)
    assert found[1] == exact
    assert found[2].estimated
    assert count(prompts, [first, near, far], NOTHING, rooms)[1].estimated


def test_nearly_too_long_is_decided_as_a_run_does(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = PromptTokenizer(tokenizer)
    monkeypatch.setattr(TokenCounter, "suffixes", lambda *_: (9, 9, 9))  # a wrong measurement
    rendered = Rendered(None, TEXT)
    exact = as_a_run(prompts, rendered)
    assert count(prompts, [rendered]) != [exact]
    assert count(prompts, [rendered], rooms=(exact.context + 7,) * 3) == [exact]


@pytest.mark.parametrize("place", ["bad {}", "{} bad", "bad. {} end."])
@pytest.mark.parametrize("effort", [Effort(), NOTHING], ids=["counted", "estimated"])
def test_a_prompt_that_fails_raises_row_error(make_tokenizer: Callable[..., Any], place: str, effort: Effort) -> None:
    fails = "{% if 'bad' in messages[-1].content %}{{ raise_exception('x') }}{% endif %}"
    prompts = PromptTokenizer(make_tokenizer(chat_template="{{ messages[-1].content }}" + fails))
    good, bad = Rendered(None, TEXT * 9), Rendered(None, place.format(TEXT * 9))
    counter = TokenCounter(prompts, 3, effort)
    counter.count(good, QUERIES)
    with pytest.raises(RowError):
        counter.count(bad, QUERIES)
    counter.count(good, QUERIES)


# ---- the hit index


def test_stored_contexts_are_checked_first_and_then_trusted() -> None:
    labels = [label_number(f"{index:064x}") for index in range(200)]
    index = HitIndex((f"{number:064x}", 100 + number) for number in range(200))
    assert index.trusted_tokens(label_number("absent")) is None
    assert [index.trusted_tokens(label) for label in labels] == [None] * 200  # all are to be checked: none is confirmed
    assert all(index.contains(label, 100 + number) for number, label in enumerate(labels))
    trusted = [index.trusted_tokens(label) for label in labels]
    assert [tokens or 100 + number for number, tokens in enumerate(trusted)] == list(range(100, 300))
    assert 5 < trusted.count(None) < 20
    assert not index.contains(label_number("absent"), 107)
    assert index.contains(labels[7], 90, estimated=True)


def test_one_stored_context_that_ends_elsewhere_ends_the_trust() -> None:
    index = HitIndex([("a", 10), ("b", 20), ("b", 19)])
    assert index.contains(label_number("b"), 107, estimated=True)
    assert index.trusted_tokens(label_number("b")) is None  # two lengths: the tokens must be counted
    assert not index.contains(label_number("a"), 9)
    assert index.trusted_tokens(label_number("b")) is None
    assert index.contains(label_number("b"), 19)
    assert index.contains(label_number("b"), 20)
    assert not index.contains(label_number("b"), 18)
    assert not index.contains(label_number("b"), 20, estimated=True)
    assert HitIndex([("\ud800", 1)]).trusted_tokens(label_number("a")) is None
