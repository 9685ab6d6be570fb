"""What is left to do of each document, and what becomes of its rows once a crew has answered it.

The rows of a group are committed together, and a group cut off midway is answered again whole, so that which rows share
a batch never depends on where a run was interrupted. Knows rows, results and the report; not how answers come about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from pipeline.errors import Interrupted, ModelProcessDied, RowError, StoppedAtFailure
from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import Renderer
from pipeline.inputs.windows import WindowCutter
from pipeline.output.results import Results
from pipeline.report import Report
from pipeline.retry import OnFailure
from pipeline.run.executor import Executor, Run
from pipeline.run.fingerprint import context_label, kept_rows, row_fingerprints
from pipeline.run.task import DocumentTask


class Work:
    """The documents of a run, before and after a crew has them; a context, in which rows are written meanwhile.

    ``committed`` is called with the report of what is, from any thread. ``on_failure``: what is done about rows that
    fail; StoppedAtFailure is raised where that is to stop. ``condemned`` are the documents that the model is not to see
    again, each with what happened.
    """

    def __init__(
        self,
        run: Run,
        crew: Executor,
        results: Results,
        committed: Callable[[Report], None],
        on_failure: OnFailure,
        condemned: Mapping[str, str],
    ) -> None:
        self._job, self._identity, self._crew, self._results = run.job, run.identity, crew, results
        self._progress, self._report, self._committed = run.progress, run.report, committed
        self._condemned, self._on_failure = condemned, on_failure
        self._renderer, self._fitting = Renderer(run.job.prompt), WindowCutter(run.job)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="results")
        self._written: Future[None] | None = None

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()
        if kind is None or issubclass(kind, Interrupted):
            self._wait()

    def look(self, group: Sequence[Document]) -> list[DocumentTask]:
        """What is left of documents, as far as that can be told and prepared beforehand; from any thread."""
        return self._crew.prepare([self._look(document) for document in group])

    def _look(self, document: Document) -> DocumentTask:
        try:
            rendered = self._renderer.render(document)
        except RowError as error:
            todo = DocumentTask(document, None, document.queries)
            todo.fail(error)
            return todo
        cut = self._fitting.mark(rendered, document.queries)
        fingerprints = row_fingerprints(self._identity, rendered, document.queries, self._job.generation, cut)
        kept = kept_rows(self._results.rows(document.id), fingerprints, self._on_failure.keep)
        queries = [query for query in document.queries if query.id not in kept]
        todo = DocumentTask(document, rendered, queries, list(kept.values()), fingerprints, context_label(rendered))
        if document.id in self._condemned:
            todo.fail(ModelProcessDied(self._condemned[document.id]))
        return todo

    def commit(self, group: Sequence[DocumentTask]) -> None:
        """Count what became of a group, and have it written while the next is computed."""
        rows = [row for todo in group for row in todo.rows.values()]
        kept = [row for todo in group for row in todo.kept]
        failed = [row for row in rows if row.status == "error"]
        report = self._report
        report.rows_kept += sum(row.status == "ok" for row in kept)
        report.rows_answered += len(rows) - len(failed)
        for row in [*failed, *(row for row in kept if row.status == "error")]:
            report.add_failure(str(row.error_type), row.failure)
        report.answer_tokens += sum(row.answer_tokens or 0 for row in rows)
        report.documents_done += len(group)
        report.documents_truncated += sum(todo.truncated for todo in group)
        report.documents_split += sum(todo.split for todo in group)
        self._progress.rows_done(len(kept))
        self._wait()
        self._written = self._writer.submit(self._write, group, report.copy())
        if self._job.cache.budget is not None or self._job.cache.keep == "job":
            self._wait()  # until there is room that the group has no use for any more
        if failed and self._on_failure.stop:
            raise StoppedAtFailure(failed[0].failure)

    def _write(self, group: Sequence[DocumentTask], report: Report) -> None:
        changed = [todo for todo in group if todo.queries]
        if changed:
            self._results.commit(
                {todo.document_id: [*todo.kept, *(todo.rows[query.id] for query in todo.queries)] for todo in changed}
            )
        self._progress.end_documents([todo.document_id for todo in group], report)
        self._committed(report)
        self._crew.committed(group)

    def _wait(self) -> None:
        """Until what was last to be written is. Raises OutputError where the disk refused."""
        written, self._written = self._written, None
        if written is not None:
            written.result()
