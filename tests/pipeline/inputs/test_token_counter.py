"""A plan's counts against those of a run, which tokenises every prompt whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cache.hit_index import HitIndex, label_number
from pipeline.inputs.prompts import PromptTokenizer, Rendered
from pipeline.inputs.token_counter import Asked, Effort, Lengths, Questions, TokenCounter

QUERIES = ("What did the board decide?", "Who signed the contract?", "\n1")
TEXT = "The board met on the third of May and decided the budget. "
NOTHING = Effort(0, 0, 0)


def as_a_run(prompts: PromptTokenizer, rendered: Rendered) -> Lengths:
    tokens = prompts.tokenise(rendered, QUERIES)
    return Lengths(len(tokens.context), tuple(len(suffix) for suffix in tokens.suffixes))


def asking(rendered: Rendered, *known: Any, rooms: tuple[int, ...] = (), **check: bool) -> Asked:
    return Asked(rendered, Questions(QUERIES, rooms), *known, **check)


def count(prompts: PromptTokenizer, asked: Sequence[Asked], effort: Effort | None = None) -> list[Lengths | None]:
    counter = TokenCounter(prompts, len(asked), effort or Effort())
    return [lengths for one in asked for lengths in counter.count([one])]


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
    counted = TokenCounter(prompts, len(documents), Effort()).count([asking(each) for each in documents])
    assert counted == [as_a_run(prompts, each) for each in documents]


def test_each_way_to_end_has_its_own_seam(tokenizer: Any) -> None:
    prompts = PromptTokenizer(tokenizer)
    documents = [Rendered(None, TEXT + ending) for ending in ("a", "a\n\n", "a.", "b", "b\n\n", "<|end|>\n\n")]
    expected = [as_a_run(prompts, each) for each in documents]
    assert count(prompts, [asking(each) for each in documents]) == expected
    assert len({lengths.suffixes for lengths in expected}) > 1


def test_documents_with_other_queries_have_other_seams(tokenizer: Any) -> None:
    prompts = PromptTokenizer(tokenizer)
    rendered = Rendered(None, TEXT)
    sets = [("Why?",), ("What else is there to be said of it?", "Why?")]
    counter = TokenCounter(prompts, 2, Effort())
    found = counter.count([Asked(rendered, Questions(texts, ())) for texts in sets])
    expected = [prompts.tokenise(rendered, texts) for texts in sets]
    assert found == [Lengths(len(each.context), tuple(map(len, each.suffixes))) for each in expected]


def test_a_tokenizer_that_takes_one_text_at_a_time(tokenizer: Any) -> None:
    class Slow:
        chat_template = None

        def encode(self, text: str, **options: Any) -> Any:
            return tokenizer.encode(text.replace("\n", "<n>"), **options)

    prompts = PromptTokenizer(Slow())
    documents = [Rendered(None, TEXT * times) for times in (1, 2, 3)]
    assert count(prompts, [asking(each) for each in documents]) == [as_a_run(prompts, each) for each in documents]


def test_beyond_the_effort_documents_are_estimated(tokenizer: Any) -> None:
    prompts = PromptTokenizer(tokenizer)
    documents = [Rendered(None, TEXT * times) for times in (40, 80, 20)]
    first, *others = count(prompts, [asking(each) for each in documents], effort=NOTHING)
    assert first == as_a_run(prompts, documents[0])
    for document, estimate in zip(documents[1:], others, strict=True):
        assert estimate is not None
        assert estimate.estimated
        assert estimate.context == pytest.approx(as_a_run(prompts, document).context, rel=0.05)


def test_the_effort_is_spread_over_all_documents(tokenizer: Any) -> None:
    documents = [asking(Rendered(None, TEXT * 10))] * 100
    effort = Effort(first=10 * 600, spread=30 * 600, near=0)
    estimated = [bool(each and each.estimated) for each in count(PromptTokenizer(tokenizer), documents, effort=effort)]
    assert not any(estimated[:9])
    for quarter in range(0, 100, 25):
        assert not all(estimated[quarter : quarter + 25])
    assert 50 < sum(estimated) < 75


def test_what_is_near_the_limit_is_counted_all_the_same(tokenizer: Any) -> None:
    prompts = PromptTokenizer(tokenizer)
    near, far = Rendered(None, "Mixed: éé 1, 2. " * 60), Rendered(None, TEXT)
    exact = as_a_run(prompts, near)
    rooms = (exact.context + max(exact.suffixes),) * 3
    first = asking(Rendered(None, "Mixed: éé 1, 2. " * 50), rooms=rooms)
    asked = [first, asking(near, rooms=rooms), asking(far, rooms=rooms)]
    found = count(prompts, asked, Effort(0, 0, 1 << 20))
    assert found[1] == exact
    assert found[2] is not None
    assert found[2].estimated
    beyond = count(prompts, asked, NOTHING)[1]
    assert beyond is not None
    assert beyond.estimated


def test_nearly_too_long_is_decided_as_a_run_does(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = PromptTokenizer(tokenizer)
    monkeypatch.setattr(TokenCounter, "_suffixes", lambda *_: (9, 9, 9))  # a seam that was measured wrong
    rendered = Rendered(None, TEXT)
    exact = as_a_run(prompts, rendered)
    assert count(prompts, [asking(rendered)]) != [exact]
    assert count(prompts, [asking(rendered, rooms=(exact.context + 7,) * 3)]) == [exact]


def test_known_tokens_are_counted_only_to_be_checked(tokenizer: Any) -> None:
    prompts = PromptTokenizer(tokenizer)
    rendered = Rendered(None, TEXT)
    exact = as_a_run(prompts, rendered)
    wrong = exact.context + 1000
    known, checked = count(prompts, [asking(rendered, wrong), asking(rendered, wrong, check=True)])
    assert known == Lengths(wrong, exact.suffixes)
    assert checked == exact


@pytest.mark.parametrize("place", ["bad {}", "{} bad", "bad. {} end."])
def test_a_prompt_that_fails_is_none(make_tokenizer: Callable[..., Any], place: str) -> None:
    fails = "{% if 'bad' in messages[-1].content %}{{ raise_exception('x') }}{% endif %}"
    prompts = PromptTokenizer(make_tokenizer(chat_template="{{ messages[-1].content }}" + fails))
    good, bad = Rendered(None, TEXT * 9), Rendered(None, place.format(TEXT * 9))
    for effort in (Effort(), NOTHING):
        first, failed, last = count(prompts, [asking(good), asking(bad), asking(good)], effort=effort)
        assert first is not None
        assert last is not None
        assert failed is None


# ---- what is stored


def test_what_is_stored_is_checked_first_and_then_believed() -> None:
    labels = [f"{index:064x}" for index in range(200)]
    stored = HitIndex((label, 100 + index) for index, label in enumerate(labels))
    assert stored.expected(label_number("absent")) == (None, False)
    asked = [stored.expected(label_number(label)) for label in labels]
    assert asked == [(100 + index, True) for index in range(200)]  # a batch, before anything is confirmed
    assert all(stored.holds(label_number(label), 100 + index) for index, label in enumerate(labels))
    asked = [stored.expected(label_number(label)) for label in labels]
    assert [tokens for tokens, _ in asked] == list(range(100, 300))
    assert 5 < sum(check for _, check in asked) < 20
    assert not stored.holds(label_number("absent"), 107)
    assert stored.holds(label_number(labels[7]), 90, estimated=True)


def test_one_stored_context_that_ends_elsewhere_ends_the_trust() -> None:
    stored = HitIndex([("a", 10), ("b", 20), ("b", 19)])
    assert stored.expected(label_number("b"))[1]  # two lengths: it must be counted
    assert not stored.holds(label_number("a"), 9)
    assert stored.expected(label_number("b")) == (None, False)
    assert stored.holds(label_number("b"), 19)
    assert stored.holds(label_number("b"), 20)
    assert not stored.holds(label_number("b"), 18)
    assert not stored.holds(label_number("b"), 20, estimated=True)
    assert HitIndex([("\ud800", 1)]).expected(label_number("a")) == (None, False)
