"""Asking: the questions of a document's queries are written as soon as the answers that they use are known.

Before a document is answered, this is done with the rows of earlier runs; then again each time that some of its queries
are answered, until every query has a row. What decides a question is known then, and so is the row's fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

from pipeline.errors import AnswerMissing, RowError
from pipeline.execution.fingerprint import RowFingerprints, skipped_fingerprint
from pipeline.execution.task import DocumentTask, error_row
from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import Rendered, Renderer
from pipeline.inputs.questions import Question, QuestionWriter, chain_of, check_columns, condition_answers
from pipeline.inputs.windows import WindowCutter
from pipeline.job.job import Job, Query
from pipeline.models.loading import model_folder
from pipeline.models.special_tokens import SpecialTokens
from pipeline.output.rows import Row

if TYPE_CHECKING:
    from turboquant.io.identity import Identity


class Asker:
    """Asks the queries of a job's documents."""

    def __init__(self, job: Job, identity: Identity) -> None:
        self._documents, self._generation, self._identity = job.documents, job.generation, identity
        self._renderer = Renderer(job.prompt, job.documents)
        self._writer, self._window_cutter = QuestionWriter(job.documents), WindowCutter(job)
        self._special = None
        if job.prompt.special_tokens == "text":
            self._special = SpecialTokens.of_folder(model_folder(job))

    def fingerprints(self, document: Document, rendered: Rendered) -> RowFingerprints:
        """Return what makes the fingerprints of a document's rows."""
        cut = self._window_cutter.mark(rendered, document.queries)
        keeps_text = cache(partial(self._renderer.keeps_text, document, rendered))
        unseen = partial(self._unseen, document, keeps_text)
        return RowFingerprints(self._identity, rendered, self._generation, cut, self._special, unseen)

    def _unseen(self, document: Document, keeps_text: Callable[[], bool], query: Query) -> list[object]:
        """Return what decides a query's row besides its prompt: what its check reads, and the text of quotations.

        keeps_text: returns whether the prompt has the document's text as it is.
        """
        text, read = self._documents.text, check_columns(query, self._documents)
        columns = [document.columns[name] for name in sorted(read - {text, self._documents.id})]
        uses_text = text in read or query.settings(self._generation).wants_evidence
        unseen: list[object] = [["columns", *columns]] if columns else []
        if uses_text and not keeps_text():
            unseen.append(["text", document.text])
        return unseen

    def ask(self, document: Document, query: Query, rows: Mapping[str, Row], unanswered: Row) -> Question | Row:
        """Return the question of a query, or its row if the model is not asked: it is skipped, or an error.

        rows: of the document's queries, by id; those whose answers the query uses are among them. unanswered: the
        query's row as it is without an answer.
        """
        try:
            if not self._writer.is_asked(document, query, _answers(condition_answers(query), rows)):
                return replace(unanswered, status="skipped", fingerprint=skipped_fingerprint(str(query.when)))
            return self._writer.write(document, query, _answers(chain_of(document.queries).uses(query.id), rows))
        except RowError as error:
            return error_row(unanswered, error)

    def refusal(self, task: DocumentTask, query: Query, row: Row) -> str | None:
        """Return why a query's check refuses the answer of a row, or None."""
        return self._writer.refusal(task.document, query, row.answer or "") if row.status == "ok" else None

    def go_on(self, task: DocumentTask, rows: Mapping[str, Row]) -> tuple[DocumentTask, dict[str, Row]]:
        """Ask those of a task's waiting queries whose answers that they use are known by now.

        rows: of the document's queries so far, by id. Returns the task with the new questions, and the rows of queries
        that the model is not asked.
        """
        chain, known, own = chain_of(task.document.queries), dict(rows), dict[str, Row]()
        questions, fingerprints = dict(task.questions), dict(task.fingerprints)
        waiting = {query.id for query in task.waiting}
        if not waiting or task.rendered is None:
            return task, own
        of_rows = self.fingerprints(task.document, task.rendered)
        for query in chain.order:
            if query.id in waiting and query.id not in known and known.keys() >= set(chain.uses(query.id)):
                asked = self.ask(task.document, query, known, task.row(query))
                if isinstance(asked, Row):
                    known[query.id] = own[query.id] = asked
                else:
                    questions[query.id], fingerprints[query.id] = asked, of_rows.of(query, asked)
        return replace(task, questions=questions, fingerprints=fingerprints), own

    def give_up(self, task: DocumentTask, error: RowError) -> DocumentTask:
        """Return a task in which no query is open: what the model would have been asked has the error."""
        kept = {row.query_id: row for row in task.kept}
        while task.open_queries:
            decided = {**task.decided, **task.failures(error)}
            task, own = self.go_on(replace(task, decided=decided), kept | decided)
            task = replace(task, decided={**decided, **own})
        return task


def _answers(query_ids: Collection[str], rows: Mapping[str, Row]) -> dict[str, str | None]:
    """Return the answers to queries; None for one that was skipped. Raises AnswerMissing if one failed."""
    for query_id in query_ids:
        row = rows[query_id]
        if row.status == "error":
            raise AnswerMissing(f"the answer to '{query_id}', which it uses, failed: {row.error_type}: {row.error}")
    return {query_id: rows[query_id].answer for query_id in query_ids}
