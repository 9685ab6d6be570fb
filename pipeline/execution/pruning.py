"""Rows of a result that its job does not ask for any more: a run removes them only if the user wants that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.errors import ResultWouldShrink
from pipeline.inputs.documents import document_digest
from pipeline.inputs.inputs import Inputs
from pipeline.output.results import Results

_MOST_NAMED = 3


@dataclass
class Surplus:
    """Rows that a run of the whole job would remove.

    rows: how many they are. documents: rows of each document that the job does not have. queries: rows of each query
    that is no longer asked of a document that stays.
    """

    rows: int = 0
    documents: dict[str, int] = field(default_factory=dict)
    queries: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return how many rows of which documents and queries they are.

        >>> print(Surplus(8, {"d1": 3, "d2": 3}, {"who": 2}))
        6 of the documents 'd1', 'd2' and 2 of the query 'who'
        """
        parts = [_named(self.documents, "document", "documents"), _named(self.queries, "query", "queries")]
        return " and ".join(filter(None, parts))

    def refuse(self, output: str) -> None:
        """Raise ResultWouldShrink if there are any. output: the result."""
        if self.rows:
            raise ResultWouldShrink(
                f"{output}: the job does not ask for {self.rows:,} of its rows any more, {self}; --prune removes them, "
                "and with --document, --query or --limit a run answers a part of the job and keeps all other rows"
            )


def find_surplus(results: Results, inputs: Inputs) -> Surplus:
    """Return the rows of a result that its job, whatever the shard, does not ask for."""
    surplus = Surplus()
    if not results.exist:
        return surplus
    documents = {document_digest(document_id) for document_id, _ in inputs.job_pairs()}
    for document_id, query_ids in results.pairs():
        if document_digest(document_id) not in documents:
            surplus.documents[document_id] = len(query_ids)
            surplus.rows += len(query_ids)
            continue
        gone = set(query_ids).difference(inputs.query_ids(document_id))
        surplus.queries |= {query_id: surplus.queries.get(query_id, 0) + 1 for query_id in gone}
        surplus.rows += len(gone)
    return surplus


def _named(rows: Mapping[str, int], one: str, several: str) -> str:
    if not rows:
        return ""
    names = sorted(rows)
    named = ", ".join(f"'{name}'" for name in names[:_MOST_NAMED])
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return f"{sum(rows.values()):,} of the {several if len(names) > 1 else one} {named}{more}"
