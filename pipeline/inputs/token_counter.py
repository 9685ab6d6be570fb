"""The numbers of tokens in documents, for ``pipeline plan``, which counts a sample and estimates the rest.

A run tokenises every query's whole prompt. The counter tokenises the first query's prompt only. The number of tokens
after the context is measured on the last characters of the context, once for each way in which contexts end. The
counts are those of a run unless the end of the context depends on earlier characters than these. Documents that nearly
fill the model's limit are therefore counted again exactly as a run counts them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import RowError
from pipeline.inputs.prompts import PromptTokenizer, Rendered

_TAIL = 256  # characters of a context on which the tokens after it are measured
_ENDING = 32  # characters of a context that decide this number
# Contexts that end in any word and this punctuation end in the same tokens, but for those of the word.
_PLAIN_ENDING = re.compile(r"\w[\s.,;:!?'\")\]]{0,8}\Z")
_ENDINGS_KEPT = 4096
_COUNT_ERROR = 8  # tokens by which a count may be wrong
_ESTIMATE_ERROR = 0.25  # share of its tokens by which an estimate may be wrong


@dataclass(frozen=True)
class Effort:
    """The most characters to tokenise.

    sample: for counting; half of it is spent on the first documents, the other half evenly on all. near_limit: for
    documents that nearly fill the model's limit.
    """

    sample: int = 48 << 20
    near_limit: int = 24 << 20


@dataclass(frozen=True)
class Lengths:
    """Tokens of a document's context and of each query's suffix."""

    context: int
    suffixes: tuple[int, ...]
    estimated: bool = False


class TokenCounter:
    """Counts or estimates the tokens of documents, one after the other.

    documents: how many documents there will be. The first one is always counted.
    """

    def __init__(self, prompts: PromptTokenizer, documents: int, effort: Effort) -> None:
        self._prompts, self._effort = prompts, effort
        self._documents, self._seen = max(documents, 1), 0
        self._sampled_tokens = self._sampled_characters = self._near_limit_characters = 0
        self._suffixes: dict[tuple[bool, str], tuple[int, ...]] = {}  # by ending, for these queries
        self._query_texts: Sequence[str] = ()

    def count(self, rendered: Rendered, query_texts: Sequence[str], rooms: Sequence[int] = ()) -> Lengths:
        """Return the lengths of a document's prompts.

        rooms: for each query, the most tokens that its prompt may have; empty if the model has no limit. Raises
        RowError if the chat template fails for the document.
        """
        self._seen += 1
        prompt = self._prompts.prompt_text(rendered, query_texts[0])
        suffixes = self.suffixes(rendered, query_texts)
        estimate = round(len(prompt) * self._sampled_tokens / max(self._sampled_characters, 1)) - suffixes[0]
        lengths = Lengths(max(estimate, 1), suffixes, estimated=True)
        allowed = self._effort.sample * (self._documents + self._seen) // (2 * self._documents)
        if self._sampled_characters and self._sampled_characters + len(prompt) > allowed:
            is_near = _is_near(lengths, rooms, round(_ESTIMATE_ERROR * lengths.context))
            if not is_near or not self._spend_near_limit(len(prompt)):
                return lengths
        if rooms and (beyond := self._prompts.estimate_beyond(rendered.context, max(rooms))):
            return Lengths(beyond, suffixes, estimated=True)
        tokens = self._prompts.count([prompt])[0]
        self._sampled_tokens += tokens
        self._sampled_characters += len(prompt)
        lengths = Lengths(tokens - suffixes[0], suffixes)
        if _is_near(lengths, rooms, _COUNT_ERROR) and self._spend_near_limit(len(prompt) * len(query_texts)):
            return self._tokenise(rendered, query_texts)
        return lengths

    def suffixes(self, rendered: Rendered, query_texts: Sequence[str]) -> tuple[int, ...]:
        """Return the number of each query's tokens after the context. Raises RowError."""
        if query_texts != self._query_texts or len(self._suffixes) >= _ENDINGS_KEPT:
            self._suffixes.clear()
            self._query_texts = query_texts
        ending = rendered.context[-_ENDING:]
        if plain := _PLAIN_ENDING.search(ending):
            ending = plain[0]
        key = rendered.system is None, ending
        if key not in self._suffixes:
            try:
                lengths = self._tokenise(Rendered(rendered.system, rendered.context[-_TAIL:]), query_texts)
            except RowError:  # the template may refuse a part of a text and accept the whole
                return self._tokenise(rendered, query_texts).suffixes
            self._suffixes[key] = lengths.suffixes
        return self._suffixes[key]

    def _spend_near_limit(self, characters: int) -> bool:
        if self._near_limit_characters + characters > self._effort.near_limit:
            return False
        self._near_limit_characters += characters
        return True

    def _tokenise(self, rendered: Rendered, query_texts: Sequence[str]) -> Lengths:
        tokens = self._prompts.tokenise(rendered, query_texts)
        return Lengths(len(tokens.context), tuple(map(len, tokens.suffixes)))


def _is_near(lengths: Lengths, rooms: Sequence[int], error: int) -> bool:
    """Return whether an error of this many tokens could decide whether a query fits."""
    return any(
        abs(lengths.context + suffix - room) <= error for suffix, room in zip(lengths.suffixes, rooms, strict=False)
    )
