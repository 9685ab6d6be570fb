"""How many tokens documents have, for a plan: cheaper than tokenising them as a run does.

A run tokenises every query's whole prompt. Here the first query's alone is, many documents at a time; how many of its
tokens come after the context is measured on the context's last characters, once for each way in which contexts end.
That gives a run's counts wherever the seam between context and query depends on those characters alone. Counts that
are nearly the most that the model reads are taken again as a run takes them, so that it doesn't decide who fits.

Beyond an effort, in characters, the rest is estimated from the tokens a character of the counted documents. Knows
prompts and tokens; not where documents come from, nor what is stored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import RowError
from pipeline.inputs.prompts import PromptTokenizer, Rendered

_TAIL = 256  # characters of a context on which its seam is measured
_ENDING = 32  # and on which it may depend
# Whatever the word, a context that ends in it and in plain punctuation ends in the same tokens but for the word's.
_ORDINARY = re.compile(r"\w[\s.,;:!?'\")\]]{0,8}\Z")
_ENDINGS_KEPT = 4096
_SEAM_MARGIN = 8  # tokens by which a seam might be wrong
_ESTIMATE_MARGIN = 0.25  # share of its tokens by which an estimate might be wrong


@dataclass(frozen=True)
class Effort:
    """Characters to tokenise; the first batch is always counted.

    The first documents are counted until ``first`` is spent; ``spread`` is then given out evenly over all documents, or
    the estimate would be of the first ones only. ``near`` is for documents near the model's limit, to count those that
    would be estimated and to count the others again as a run does.
    """

    first: int = 24 << 20
    spread: int = 24 << 20
    near: int = 24 << 20


@dataclass(frozen=True)
class Questions:
    """A document's queries: their texts, and the most tokens that each's prompt may have.

    There are no ``rooms`` where the model has no limit.
    """

    texts: tuple[str, ...]
    rooms: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A document to count, and its queries.

    Where ``known`` tokens are those of its context, it is tokenised only to ``check`` them.
    """

    rendered: Rendered
    questions: Questions
    known: int | None = None
    check: bool = False


@dataclass(frozen=True)
class Lengths:
    """Tokens of a context and of each query's suffix."""

    context: int
    suffixes: tuple[int, ...]
    estimated: bool = False


class TokenCounter:
    """Counts documents' tokens, within an effort.

    documents: how many there will be.
    """

    def __init__(self, prompts: PromptTokenizer, documents: int, effort: Effort) -> None:
        self._prompts = prompts
        self._documents, self._effort = documents, effort
        self._seen = self._spent = self._near_spent = 0
        self._tokens = self._characters = 0  # of the prompts that were counted
        self._endings: dict[tuple[bool, str], tuple[int, ...]] = {}
        self._texts: tuple[str, ...] = ()  # of the queries that they are for

    def count(self, batch: Sequence[Asked]) -> list[Lengths | None]:
        """The lengths of each document, or None where its prompt fails."""
        drafts = [self._draft(asked) for asked in batch]
        texts = [draft.text for draft in drafts if draft and draft.tokenise]
        counts = iter(self._count(texts))
        return [
            None if draft is None else self._settle(asked, draft, next(counts) if draft.tokenise else None)
            for asked, draft in zip(batch, drafts, strict=True)
        ]

    def _draft(self, asked: Asked) -> _Draft | None:
        self._seen += 1
        try:
            suffixes = self._suffixes(asked)
            if asked.known is not None and not asked.check:
                return _Draft("", suffixes, tokenise=False)
            text = self._prompts.prompt_text(asked.rendered, asked.questions.texts[0])
        except RowError:
            return None
        return _Draft(text, suffixes, self._is_worth_it(asked, len(text), suffixes))

    def _is_worth_it(self, asked: Asked, characters: int, suffixes: tuple[int, ...]) -> bool:
        allowed = self._effort.first + self._effort.spread * self._seen // max(self._documents, 1)
        if not self._characters or self._spent + characters <= allowed:
            self._spent += characters
            return True
        if asked.known is not None:
            return False
        estimate = self._estimate(characters, suffixes)
        margin = round(_ESTIMATE_MARGIN * estimate)
        return self._is_near(asked, estimate, suffixes, margin) and self._may_look_near(characters)

    def _settle(self, asked: Asked, draft: _Draft, counted: int | None) -> Lengths | None:
        if counted is None and asked.known is None:
            return Lengths(self._estimate(len(draft.text), draft.suffixes), draft.suffixes, estimated=True)
        context = (asked.known or 0) if counted is None else counted - draft.suffixes[0]
        characters = len(asked.rendered.context) * len(asked.questions.texts)
        if self._is_near(asked, context, draft.suffixes, _SEAM_MARGIN) and self._may_look_near(characters):
            return self._count_as_a_run(asked)
        return Lengths(context, draft.suffixes)

    def _count(self, texts: list[str]) -> list[int]:
        counts = self._prompts.count(texts) if texts else []
        self._tokens += sum(counts)
        self._characters += sum(map(len, texts))
        return counts

    def _estimate(self, characters: int, suffixes: tuple[int, ...]) -> int:
        return max(round(characters * self._tokens / self._characters) - suffixes[0], 1)

    def _is_near(self, asked: Asked, context: int, suffixes: tuple[int, ...], margin: int) -> bool:
        """Whether a wrong count might decide if a query fits."""
        pairs = zip(suffixes, asked.questions.rooms, strict=False)
        return any(abs(context + suffix - room) <= margin for suffix, room in pairs)

    def _may_look_near(self, characters: int) -> bool:
        if self._near_spent + characters > self._effort.near:
            return False
        self._near_spent += characters
        return True

    def _suffixes(self, asked: Asked) -> tuple[int, ...]:
        """Each query's tokens after the context. Raises RowError where a prompt fails."""
        rendered, texts = asked.rendered, asked.questions.texts
        if texts is not self._texts:
            self._endings.clear()
            self._texts = texts
        ordinary = _ORDINARY.search(rendered.context[-_ENDING:])
        key = rendered.system is None, ordinary[0] if ordinary else rendered.context[-_ENDING:]
        if (known := self._endings.get(key)) is not None:
            return known
        try:
            lengths = self._tokenise(Rendered(rendered.system, rendered.context[-_TAIL:]), texts)
        except RowError:  # of the shortened text, perhaps not of the whole
            return self._tokenise(rendered, texts).suffixes
        if len(self._endings) >= _ENDINGS_KEPT:
            self._endings.clear()
        self._endings[key] = lengths.suffixes
        return lengths.suffixes

    def _count_as_a_run(self, asked: Asked) -> Lengths | None:
        try:
            return self._tokenise(asked.rendered, asked.questions.texts)
        except RowError:
            return None

    def _tokenise(self, rendered: Rendered, query_texts: Sequence[str]) -> Lengths:
        tokens = self._prompts.tokenise(rendered, query_texts)
        return Lengths(len(tokens.context), tuple(map(len, tokens.suffixes)))


@dataclass(frozen=True)
class _Draft:
    """The first query's prompt, ``text``, and whether it is to be tokenised."""

    text: str
    suffixes: tuple[int, ...]
    tokenise: bool
