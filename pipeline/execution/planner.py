"""The planner makes the task of each document: its prompt, its questions, their fingerprints, and the rows to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.errors import ModelProcessDied, RowError
from pipeline.execution.asking import Asker
from pipeline.execution.fingerprint import context_label, is_within
from pipeline.execution.task import DocumentTask, error_row
from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import Renderer
from pipeline.inputs.questions import chain_of
from pipeline.job.job import Job, Query
from pipeline.output.rows import Row
from turboquant.runtime.versions import computing_versions, describe_difference

if TYPE_CHECKING:
    from turboquant.io.identity import Identity


class TaskPlanner:
    """Makes the task of each document.

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
        self._generation = job.generation
        self._keep_failed, self._quarantined = keep_failed, quarantined or {}
        self._renderer, self._asker = Renderer(job.prompt, job.documents), Asker(job, identity)

    def plan(self, document: Document, known: Mapping[str, Row]) -> DocumentTask:
        """Return the task of a document. known: its rows of earlier runs, by query id.

        The questions that use answers which are not kept are left open.
        """
        wanted = document.wanted
        wanted_ids = {query.id for query in wanted}
        others = [row for query_id, row in known.items() if query_id not in wanted_ids]
        task = DocumentTask(document, None, wanted, others=others)
        try:
            rendered = self._renderer.render(document)
        except RowError as error:
            return replace(task, decided={query.id: error_row(task.row(query), error) for query in wanted})
        chain, of_rows = chain_of(document.queries), self._asker.fingerprints(document, rendered)
        rows: dict[str, Row] = {}  # that are decided or kept
        decided, questions, fingerprints = dict[str, Row](), {}, {}
        for query in chain.order:
            if not rows.keys() >= set(chain.uses(query.id)):
                continue
            asked = self._asker.ask(document, query, rows, task.row(query))
            if isinstance(asked, Row):
                fingerprint = former = asked.fingerprint
            else:
                questions[query.id] = asked
                fingerprint, former = of_rows.of(query, asked), of_rows.of(query, asked, with_max_tokens=True)
            if query.id not in wanted_ids:
                continue
            fingerprints[query.id] = fingerprint
            if query.id in known and self._is_valid(known[query.id], query, fingerprint, former):
                rows[query.id] = replace(known[query.id], fingerprint=fingerprint)
            elif isinstance(asked, Row):
                rows[query.id] = decided[query.id] = asked
        kept = [row for query_id, row in rows.items() if query_id not in decided]
        task = replace(
            task,
            rendered=rendered,
            queries=[query for query in wanted if query.id in decided or query.id not in rows],
            kept=kept,
            decided=decided,
            questions=questions,
            fingerprints=fingerprints,
            label=context_label(rendered),
            rewritten=any(row != known[row.query_id] for row in kept),
        )
        if document.id in self._quarantined:
            return self._asker.give_up(task, ModelProcessDied(self._quarantined[document.id]))
        return task

    def fingerprints(self, document: Document, rows: Mapping[str, Row]) -> dict[str, str]:
        """Return the fingerprints that a document's wanted rows must have, by query id.

        rows: of the document, by query id, whose answers are used as they are. "" for rows that cannot be rendered.
        """
        found = dict.fromkeys((query.id for query in document.wanted), "")
        try:
            of_rows = self._asker.fingerprints(document, self._renderer.render(document))
        except RowError:
            return found
        chain, task = chain_of(document.queries), DocumentTask(document, None, document.wanted)
        for query in chain.order:
            if query.id in found and rows.keys() >= set(chain.uses(query.id)):
                asked = self._asker.ask(document, query, rows, task.row(query))
                found[query.id] = asked.fingerprint if isinstance(asked, Row) else of_rows.of(query, asked)
        return found

    def _is_valid(self, row: Row, query: Query, fingerprint: str, former: str) -> bool:
        """Return whether the row of an earlier run is the one that this run would give."""
        if self._wanted_versions is not None and describe_difference(row.versions, self._wanted_versions):
            return False
        if row.status == "error" and not self._keep_failed:
            return False
        return row.fingerprint == former or (
            row.fingerprint == fingerprint and is_within(row, query.settings(self._generation))
        )
