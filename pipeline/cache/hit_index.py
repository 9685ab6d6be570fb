"""The hit index: which contexts are in the store, found by the labels of their texts without tokenising the texts.

A stored context of the same text, weights, tokenizer and codec is the job's own context if it has the same number of
tokens. The text decides the tokens; the queries only decide where the context ends, and they seldom change that. So
the number of tokens is checked for some documents and trusted for the others, until a check fails.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

_MOST_TOKENS = (1 << 32) - 1
_FIRST_CHECKS = 32  # documents that are checked before any is trusted
_CHECK_INTERVAL = 16  # after that, one document in this many is checked


def label_number(label: str) -> int:
    """Return eight bytes of a label's digest, which are enough to distinguish contexts."""
    return int.from_bytes(blake2b(label.encode(errors="replace"), digest_size=8).digest(), "little")


class HitIndex:
    """Token counts of stored contexts by label, in twelve bytes a context. contexts: labels and token counts."""

    def __init__(self, contexts: Iterable[tuple[str, int]]) -> None:
        labels, tokens = array("Q"), array("I")
        for label, count in contexts:
            labels.append(label_number(label))
            tokens.append(min(count, _MOST_TOKENS))
        order = np.argsort(np.asarray(labels, dtype=np.uint64), kind="stable")
        self._labels = np.asarray(labels, dtype=np.uint64)[order]
        self._tokens = np.asarray(tokens, dtype=np.uint32)[order]
        self._lookups = self._confirmed = 0
        self._trusted = True

    def trusted_tokens(self, label: int) -> int | None:
        """Return the tokens of the stored context, or None if none is stored or if they must be counted."""
        stored = self._stored_tokens(label)
        if not stored or not self._trusted:
            return None
        self._lookups += 1
        is_checked = self._confirmed < _FIRST_CHECKS or self._lookups % _CHECK_INTERVAL == 0
        return None if is_checked or len(stored) > 1 else stored[0]

    def contains(self, label: int, tokens: int, estimated: bool = False) -> bool:
        """Return whether a context with this number of tokens is stored. If the store has another, trust ends.

        An estimated count is not compared: while the store is trusted, any context of the label is the right one.
        """
        stored = self._stored_tokens(label)
        if estimated:
            return self._trusted and bool(stored)
        if stored and stored != [tokens]:
            self._trusted = False
        self._confirmed += stored == [tokens]
        return tokens in stored

    def _stored_tokens(self, label: int) -> list[int]:
        if not len(self._labels):
            return []
        first = int(np.searchsorted(self._labels, np.uint64(label)))
        last = int(np.searchsorted(self._labels, np.uint64(label), side="right"))
        return [int(count) for count in self._tokens[first:last]]
