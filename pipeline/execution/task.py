"""The task of a document: its open queries, the rows that are already decided, and the result.

A task is a value: the planner (planner.py) makes it, an executor answers it and returns its result, the committer
writes both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.errors import RowError
from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import Rendered
from pipeline.inputs.questions import Question
from pipeline.job.job import Query
from pipeline.output.rows import Row
from turboquant.runtime.versions import computing_versions


@dataclass(frozen=True)
class DocumentTask:
    """One document and what is left to do for it.

    rendered: the rendered prompt, or None if the template fails. queries: those of the wanted queries without a kept
    row. kept: rows of an earlier run that are still valid. others: rows that this run is not asked for, which stay as
    they are. decided: rows, by query id, that failed or were skipped before the model saw them. questions: of all
    queries that are known so far, by query id. fingerprints: of the wanted rows that are known so far, by query id.
    label: digest of the context's text. rewritten: whether kept rows got other fingerprints than a former release gave
    them.
    """

    document: Document
    rendered: Rendered | None
    queries: Sequence[Query]
    kept: Sequence[Row] = ()
    others: Sequence[Row] = ()
    decided: Mapping[str, Row] = field(default_factory=dict)
    questions: Mapping[str, Question] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    label: str = ""
    rewritten: bool = False

    @property
    def document_id(self) -> str:
        """The document's id."""
        return self.document.id

    @property
    def open_queries(self) -> list[Query]:
        """The queries that the model must answer, or may have to."""
        return [query for query in self.queries if query.id not in self.decided]

    @property
    def waiting(self) -> list[Query]:
        """The open queries whose questions are not known yet, because they use answers that are not there yet."""
        return [query for query in self.open_queries if query.id not in self.questions]

    @property
    def asked(self) -> list[Query]:
        """The open queries whose questions are known."""
        return [query for query in self.open_queries if query.id in self.questions]

    def row(self, query: Query) -> Row:
        """Return the row of a query without an answer."""
        fingerprint = self.fingerprints.get(query.id, "")
        return Row(self.document_id, query.id, "ok", fingerprint, versions=computing_versions())

    def failures(self, error: RowError) -> dict[str, Row]:
        """Return error rows, by query id, for all open queries whose questions are known."""
        return {query.id: error_row(self.row(query), error) for query in self.asked}


@dataclass(frozen=True)
class TaskResult:
    """The result of a task.

    rows: by query id, of all queries without a kept row. truncated: the end of the document was left out.
    split: the document was read in windows. own_keys: keys of the segments that only this document uses.
    """

    rows: Mapping[str, Row]
    truncated: bool = False
    split: bool = False
    own_keys: frozenset[str] = frozenset()

    @classmethod
    def without_model(cls, task: DocumentTask) -> TaskResult:
        """Return the result of a task without open queries."""
        return cls(task.decided)


@dataclass(frozen=True)
class GroupResult:
    """The results of documents that were answered together."""

    tasks: Sequence[DocumentTask]
    results: Sequence[TaskResult]


def error_row(row: Row, error: RowError) -> Row:
    """Return the row with an error in place of an answer."""
    return replace(row, status="error", error_type=error.error_type, error=str(error))
