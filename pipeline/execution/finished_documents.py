"""The documents that a run has finished, as the parent of the model's process remembers them for the next process.

Several workers finish documents in any order, so it is not enough to count them. The parent needs little memory, so it
keeps eight bytes for each.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b


class FinishedDocuments:
    """A set of ids of documents.

    >>> finished = FinishedDocuments()
    >>> finished.add(["d1", "d3"])
    >>> [name for name in ("d1", "d2", "d3") if name in finished]
    ['d1', 'd3']
    """

    def __init__(self) -> None:
        self._digests = array("Q")
        self._found: frozenset[int] | None = None  # the same, once it was asked for an id

    def add(self, document_ids: Iterable[str]) -> None:
        """Add the ids of documents."""
        self._digests.extend(map(_digest, document_ids))
        self._found = None

    def __contains__(self, document_id: str) -> bool:
        """Return whether a document is finished."""
        if self._found is None:
            self._found = frozenset(self._digests)
        return _digest(document_id) in self._found


def _digest(document_id: str) -> int:
    return int.from_bytes(blake2b(document_id.encode(), digest_size=8).digest(), "big")
