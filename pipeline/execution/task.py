"""The task of a document: its open queries, the rows that are already decided, and the result.

A task is a value: the planner makes it, an executor answers it and returns its result, the committer writes both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline.errors import ModelProcessDied, RowError
from pipeline.execution.fingerprint import context_label, is_within, row_fingerprints
from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import Rendered, Renderer
from pipeline.inputs.windows import WindowCutter
from pipeline.job.job import Job, Query
from pipeline.models.loading import model_folder
from pipeline.models.special_tokens import SpecialTokens
from pipeline.output.rows import Row
from turboquant.runtime.versions import computing_versions, describe_difference

if TYPE_CHECKING:
    from turboquant.io.identity import Identity


@dataclass(frozen=True)
class DocumentTask:
    """One document and what is left to do for it.

    rendered: the rendered prompt, or None if the template fails. queries: those of the wanted queries without a kept
    row. kept: rows of an earlier run that are still valid. others: rows that this run is not asked for, which stay as
    they are. failed: rows, by query id, that failed before the model saw them. fingerprints: of all wanted rows, by
    query id. label: digest of the context's text. rewritten: whether kept rows got other fingerprints than a former
    release gave them.
    """

    document: Document
    rendered: Rendered | None
    queries: Sequence[Query]
    kept: Sequence[Row] = ()
    others: Sequence[Row] = ()
    failed: Mapping[str, Row] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    label: str = ""
    rewritten: bool = False

    @property
    def document_id(self) -> str:
        """The document's id."""
        return self.document.id

    @property
    def open_queries(self) -> list[Query]:
        """The queries that the model must answer."""
        return [query for query in self.queries if query.id not in self.failed]

    def row(self, query: Query) -> Row:
        """Return the row of a query without an answer."""
        fingerprint = self.fingerprints.get(query.id, "")
        return Row(self.document_id, query.id, "ok", fingerprint, versions=computing_versions())

    def failures(self, error: RowError) -> dict[str, Row]:
        """Return error rows, by query id, for all open queries."""
        return {query.id: error_row(self.row(query), error) for query in self.open_queries}


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
        return cls(task.failed)


@dataclass(frozen=True)
class GroupResult:
    """The results of documents that were answered together."""

    tasks: Sequence[DocumentTask]
    results: Sequence[TaskResult]


class TaskPlanner:
    """Makes the task of each document: renders the prompt, computes fingerprints, and finds the rows to keep.

    keep_failed: failed rows with the right fingerprint are kept too. quarantined: documents that the model must not see
    again, with the reason. versions: those that compute now, by default here, for jobs that keep no rows of others.
    """

    def __init__(
        self,
        job: Job,
        identity: Identity,
        keep_failed: bool = False,
        quarantined: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self._wanted_versions = None if job.versions == "keep" else versions or computing_versions()
        self._generation, self._identity = job.generation, identity
        self._keep_failed, self._quarantined = keep_failed, quarantined or {}
        self._renderer, self._window_cutter = Renderer(job.prompt, job.documents), WindowCutter(job)
        self._special = None
        if job.prompt.special_tokens == "text":
            self._special = SpecialTokens.of_folder(model_folder(job))

    def plan(self, document: Document, known: Mapping[str, Row]) -> DocumentTask:
        """Return the task of a document. known: its rows of earlier runs, by query id."""
        wanted = document.wanted
        wanted_ids = {query.id for query in wanted}
        others = [row for query_id, row in known.items() if query_id not in wanted_ids]
        try:
            rendered = self._renderer.render(document)
        except RowError as error:
            task = DocumentTask(document, None, wanted, others=others)
            return replace(task, failed=task.failures(error))
        cut = self._window_cutter.mark(rendered, document.queries)
        arguments = (self._identity, rendered, wanted, self._generation, cut, self._special)
        fingerprints = row_fingerprints(*arguments)
        former = row_fingerprints(*arguments, with_max_tokens=True)
        found = {query.id: known[query.id] for query in wanted if query.id in known}
        if self._wanted_versions is not None:
            now = self._wanted_versions
            found = {query_id: row for query_id, row in found.items() if not describe_difference(row.versions, now)}
        settings = {query.id: query.settings(self._generation) for query in wanted}
        kept = [
            replace(row, fingerprint=fingerprints[query_id])
            for query_id, row in found.items()
            if (self._keep_failed or row.status == "ok")
            and (
                row.fingerprint == former[query_id]
                or (row.fingerprint == fingerprints[query_id] and is_within(row, settings[query_id]))
            )
        ]
        kept_ids = {row.query_id for row in kept}
        queries = [query for query in wanted if query.id not in kept_ids]
        rewritten = any(row != found[row.query_id] for row in kept)
        label = context_label(rendered)
        task = DocumentTask(document, rendered, queries, kept, others, {}, fingerprints, label, rewritten)
        if document.id in self._quarantined:
            return replace(task, failed=task.failures(ModelProcessDied(self._quarantined[document.id])))
        return task

    def fingerprints(self, document: Document) -> dict[str, str]:
        """Return the fingerprints of a document's wanted rows, by query id; "" for rows that cannot be rendered."""
        found = self.plan(document, {}).fingerprints
        return {query.id: found.get(query.id, "") for query in document.wanted}


def error_row(row: Row, error: RowError) -> Row:
    """Return the row with an error in place of an answer."""
    return replace(row, status="error", error_type=error.error_type, error=str(error))
