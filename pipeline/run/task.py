"""What is left to do for one document, and what has come of it so far. Knows rows and tokens; does nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline.errors import RowError
from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import Rendered
from pipeline.job.job import Query
from pipeline.output.rows import Row

if TYPE_CHECKING:
    from pipeline.models.output_parser import Answer
    from pipeline.run.prefixes import Piece
    from turboquant.caches.prefix import Segment


@dataclass
class DocumentTask:
    """A document of which ``queries`` are to be answered; ``rows`` are what became of them, by query id.

    rendered: None where the prompt cannot be rendered. kept: rows that need no new answer. fingerprints: of all rows,
    by query id. label: of the context. truncated: its end is left out. split: it is read in windows. windows: those,
    each with the same queries. combined: the queries, one each, that are asked of what was answered on the windows.
    """

    document: Document
    rendered: Rendered | None
    queries: Sequence[Query]
    kept: Sequence[Row] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    label: str = ""
    truncated: bool = False
    split: bool = False
    windows: Sequence[DocumentTask] = ()
    combined: Sequence[DocumentTask] = ()
    rows: dict[str, Row] = field(default_factory=dict)
    tokenised: Tokenised | None = None

    @property
    def document_id(self) -> str:
        """The document's id."""
        return self.document.id

    @property
    def open(self) -> list[Query]:
        """The queries of which nothing has become yet."""
        return [query for query in self.queries if query.id not in self.rows]

    @property
    def succeeded(self) -> bool:
        """Whether every query was answered, now or before."""
        rows = [*self.kept, *self.rows.values()]
        return not self.open and all(row.status == "ok" for row in rows)

    def row(self, query: Query) -> Row:
        """The row of a query without what becomes of it."""
        row = Row(self.document_id, query.id, "ok", self.fingerprints.get(query.id, ""))
        if self.tokenised is None:
            return row
        lengths = len(self.tokenised.context), len(self.tokenised.suffixes[query.id])
        return replace(row, context_tokens=lengths[0], query_tokens=lengths[1])

    def answer(self, query: Query, given: Answer) -> None:
        """A query ends as this answer, which is JSON where the query has a schema."""
        self.rows[query.id] = replace(
            self.row(query),
            answer=given.text,
            answer_json=given.text if query.json_schema else None,
            thinking=given.thinking,
            finish_reason=given.finish_reason,
            answer_tokens=given.tokens,
        )

    def conclude(self) -> None:
        """The queries end as what became of them when they were asked of the windows' answers."""
        tokens = sum(len(window.tokenised.context) for window in self.windows if window.tokenised)
        for each in self.combined:
            self.rows |= {query_id: replace(row, context_tokens=tokens) for query_id, row in each.rows.items()}

    def fail(self, error: RowError, queries: Sequence[Query] | None = None) -> None:
        """Queries, all open ones unless given, end as this error."""
        for query in self.open if queries is None else queries:
            self.rows[query.id] = replace(
                self.row(query), status="error", error_type=error.error_type, error=str(error)
            )


@dataclass
class Tokenised:
    """A document's prompts in tokens: the context, what follows it by query id, and the segments it is cut into.

    restored: those of the first segments that were read ahead.
    """

    context: list[int]
    suffixes: Mapping[str, list[int]]
    pieces: Sequence[Piece]
    restored: Sequence[Segment] = ()
