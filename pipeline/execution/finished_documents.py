"""The documents that a run has finished, as the parent of the model's process remembers them for the next process.

Several workers finish documents in any order, so it is not enough to count them. The parent needs little memory, so it
keeps eight bytes for each.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from pipeline.job.shards import document_number


class FinishedDocuments:
    """A set of ids of documents.

    >>> finished = FinishedDocuments()
    >>> finished.add(["d1", "d3"])
    >>> [name for name in ("d1", "d2", "d3") if name in finished]
    ['d1', 'd3']
    """

    def __init__(self) -> None:
        self._numbers = array("Q")
        self._found: frozenset[int] | None = None  # the same, from the first question for an id on

    def add(self, document_ids: Iterable[str]) -> None:
        """Add the ids of documents."""
        self._numbers.extend(map(document_number, document_ids))
        self._found = None

    def __contains__(self, document_id: str) -> bool:
        """Return whether a document is finished."""
        if self._found is None:
            self._found = frozenset(self._numbers)
        return document_number(document_id) in self._found
