"""The rule for documents that a model's process was working on when it died.

first death                      the same documents are tried again
second death, several documents  each of them is tried alone
second death, one document       its rows become errors (ModelProcessDied)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import Enum

MOST_DEATHS = 2  # with the same documents in hand; after that, they are not tried together again


class Verdict(Enum):
    """The consequence of a death for the documents in hand."""

    RETRY = "retry"
    SEPARATE = "separate"
    FAIL = "fail"


class Quarantine:
    """Counts deaths by the documents that were in hand."""

    def __init__(self) -> None:
        self._deaths: Counter[tuple[str, ...]] = Counter()

    def record_death(self, documents: tuple[str, ...]) -> Verdict:
        """Count a death with these documents in hand, perhaps none. Return what happens to them."""
        self._deaths[documents] += 1
        return self.verdict(documents)

    def verdict(self, documents: tuple[str, ...]) -> Verdict:
        """Return what happens to documents after the deaths that were counted."""
        if self._deaths[documents] < MOST_DEATHS:
            return Verdict.RETRY
        return Verdict.SEPARATE if len(documents) > 1 else Verdict.FAIL

    def forget(self, documents: tuple[str, ...]) -> None:
        """Forget the deaths with these documents in hand, perhaps none: the work went on since then."""
        self._deaths.pop(documents, None)


def name_documents(documents: Sequence[str]) -> str:
    """Name documents that are answered together, in a few words."""
    more = f" and {len(documents) - 1} more" if len(documents) > 1 else ""
    return f"document '{documents[0]}'{more}"


def quarantine_error(cause: str) -> str:
    """Return the error of the rows of a document that killed a model's process twice."""
    return (
        f"the model's process {cause}, twice, while this document was prefilled or answered; try a shorter document, "
        "a smaller generation.batch_size or max_tokens, or fewer cache.key_bits and cache.value_bits"
    )
