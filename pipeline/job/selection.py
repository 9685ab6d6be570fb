"""The part of a job that a run is asked for: some of its documents and some of its queries."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Selection:
    """The part of a job that a command line names. Without any option it is the whole job.

    documents, queries: ids, or shell-style patterns of ids; empty for all. limit: the first N of these documents.

    >>> part = Selection(documents=("2024-*", "a[1]"), limit=3)
    >>> part.has_document("2024-05"), part.has_document("a[1]"), part.has_query("who"), bool(Selection())
    (True, True, True, False)
    >>> print(part)
    --document '2024-*' --document 'a[1]' --limit 3
    """

    documents: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    limit: int | None = None

    def __bool__(self) -> bool:
        """Return whether this is not the whole job."""
        return self != Selection()

    def __str__(self) -> str:
        """Return the selection as a command line has it."""
        words = [word for name in self.documents for word in ("--document", name)]
        words += [word for name in self.queries for word in ("--query", name)]
        return shlex.join(words + ([] if self.limit is None else ["--limit", str(self.limit)]))

    def has_document(self, document_id: str) -> bool:
        """Return whether a document's id is named. The limit is not considered."""
        return not self.documents or any(matches(document_id, pattern) for pattern in self.documents)

    def has_query(self, query_id: str) -> bool:
        """Return whether a query's id is named."""
        return not self.queries or any(matches(query_id, pattern) for pattern in self.queries)


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern is the name itself, whatever characters this has, or matches it."""
    return name == pattern or fnmatchcase(name, pattern)
