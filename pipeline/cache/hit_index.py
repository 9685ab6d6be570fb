"""Which of a job's contexts are in the store, told from their texts' labels: nothing is tokenised to find out.

A stored context of the same text, weights, tokenizer and codec is the job's own if it has as many tokens: the text
decides the tokens, the queries only where they end. The queries seldom change that, so it is checked on some documents
and believed of the others, until a check fails. Knows labels and numbers, no files.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

_MOST = (1 << 32) - 1
_CHECKED_FIRST = 32
_CHECKED_LATER = 16  # one in so many


def label_number(label: str) -> int:
    """Enough of a label to tell contexts apart, in eight bytes."""
    return int.from_bytes(blake2b(label.encode(errors="replace"), digest_size=8).digest(), "little")


class HitIndex:
    """Token counts of stored contexts by label, twelve bytes a context."""

    def __init__(self, contexts: Iterable[tuple[str, int]]) -> None:
        labels, tokens = array("Q"), array("I")
        for label, count in contexts:
            labels.append(label_number(label))
            tokens.append(min(count, _MOST))
        order = np.argsort(np.asarray(labels, dtype=np.uint64), kind="stable")
        self._labels = np.asarray(labels, dtype=np.uint64)[order]
        self._tokens = np.asarray(tokens, dtype=np.uint32)[order]
        self._asked = self._confirmed = 0
        self._trusted = True

    def expected(self, label: int) -> tuple[int | None, bool]:
        """The tokens that a context is stored with, None where they are not known, and whether to check them."""
        stored = self._stored(label)
        if not stored or not self._trusted:
            return None, False
        self._asked += 1
        unsure = len(stored) > 1 or self._confirmed < _CHECKED_FIRST  # many may be asked of before one is confirmed
        return stored[0], unsure or self._asked % _CHECKED_LATER == 0

    def holds(self, label: int, tokens: int, estimated: bool = False) -> bool:
        """Whether a context of so many tokens is stored. A count that isn't the stored one ends the trust."""
        stored = self._stored(label)
        if estimated:
            return self._trusted and bool(stored)
        if stored and stored != [tokens]:
            self._trusted = False
        self._confirmed += stored == [tokens]
        return tokens in stored

    def _stored(self, label: int) -> list[int]:
        if not len(self._labels):
            return []
        first = int(np.searchsorted(self._labels, np.uint64(label)))
        last = int(np.searchsorted(self._labels, np.uint64(label), side="right"))
        return [int(count) for count in self._tokens[first:last]]
