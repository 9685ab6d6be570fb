"""The work of a run, group by group of documents: what is left to answer, prefixes, answers, rows.

Knows the order of things and what becomes of a document when one fails; how each thing is done is the other modules'.
The model is loaded only when the first row turns out to need it. The rows of a group are committed together, and a
group cut off midway is answered again whole, so that which rows share a batch never depends on where a run was
interrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline.documents import Document
from pipeline.errors import GenerationFailed, Interrupted, ModelProcessDied, RowError, StoppedAtFailure
from pipeline.failures import OnFailure, retried
from pipeline.fitting import Fitting
from pipeline.identity import context_label, kept_rows, row_fingerprints
from pipeline.inputs import Inputs
from pipeline.job import Job
from pipeline.needs import Needs, output_digest
from pipeline.progress import Watcher
from pipeline.prompts import Renderer
from pipeline.report import Report
from pipeline.results import Results
from pipeline.todo import Todo

if TYPE_CHECKING:
    from pipeline.engine import Engine
    from pipeline.store import Store
    from turboquant import Prefix
    from turboquant.identity import Identity

_log = logging.getLogger(__name__)


class Work:
    """What is done with the documents of a run; a context, in which rows are written while the next are computed.

    ``check`` raises Interrupted where the user asked to stop. ``committed`` is called with the report of what is,
    from any thread. ``on_failure``: what is done about rows that fail; StoppedAtFailure is raised where that is to
    stop. ``condemned`` are the documents that the model is not to see again, each with what happened.
    """

    def __init__(
        self,
        job: Job,
        inputs: Inputs,
        identity: Identity,
        results: Results,
        progress: Watcher,
        report: Report,
        check: Callable[[], None],
        committed: Callable[[Report], None],
        on_failure: OnFailure,
        condemned: Mapping[str, str],
    ) -> None:
        self._job, self._inputs, self._identity, self._results = job, inputs, identity, results
        self._progress, self._report, self._check = progress, report, check
        self._committed, self._condemned, self._on_failure = committed, condemned, on_failure
        self._renderer, self._fitting = Renderer(job.prompt), Fitting(job)
        self._needs = Needs(job.cache.dir, job.result_file)
        self._loaded: Engine | None = None
        self._shown = 0  # rows in hand that the progress counts already
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

    def look(self, group: Sequence[Document]) -> list[Todo]:
        """What is left of documents, as far as that can be told and prepared beforehand; from any thread."""
        todos = [self._look(document) for document in group]
        if self._loaded is not None:
            for todo in todos:
                self._loaded.make_ready(todo)
        return todos

    def _look(self, document: Document) -> Todo:
        try:
            rendered = self._renderer.render(document)
        except RowError as error:
            todo = Todo(document, None, document.queries)
            todo.fail(error)
            return todo
        cut = self._fitting.mark(rendered, document.queries)
        fingerprints = row_fingerprints(self._identity, rendered, document.queries, self._job.generation, cut)
        kept = kept_rows(self._results.rows(document.id), fingerprints, self._on_failure.keep)
        queries = [query for query in document.queries if query.id not in kept]
        todo = Todo(document, rendered, queries, list(kept.values()), fingerprints, context_label(rendered))
        if document.id in self._condemned:
            todo.fail(ModelProcessDied(self._condemned[document.id]))
        return todo

    def do(self, group: Sequence[Todo]) -> None:
        """Answer what is left of a group, and have it committed."""
        if self._job.cache.budget is not None or self._job.cache.keep == "job":
            self._wait()  # until there is room that the group before has no use for any more
        for todo in group:
            self._report.rows_kept += sum(row.status == "ok" for row in todo.kept)
            self._progress.rows_done(len(todo.kept))
        self._answer_together(group, self._answered)
        self._commit(group)

    def _answer_together(self, todos: Sequence[Todo], on_answer: Callable[[], None]) -> None:
        ready: list[tuple[Todo, Prefix]] = []
        for todo in todos:
            if todo.open and (prefix := self._prefix(todo)) is not None:
                ready.append((todo, prefix))
        if ready:
            self._answer(ready, on_answer)

    def _answer_windows(self, todo: Todo) -> None:
        """Answer window by window what is asked of a document, and then once more from those answers."""
        for window in todo.windows:
            self._answer_together([window], lambda: None)
        todo.combined = self._engine.combine(todo)
        self._answer_together(todo.combined, self._answered)
        todo.conclude()

    def _prefix(self, todo: Todo) -> Prefix | None:
        """The prefix of a document, if it has one; what is read in windows is answered by the way."""
        engine = self._engine  # loaded before the document is begun, which is not to blame where loading fails
        self._progress.start_documents([todo.document_id])
        engine.make_ready(todo)
        if todo.windows:
            self._answer_windows(todo)
        if not todo.open:
            return None
        try:
            return retried(lambda: engine.prefix(todo), self._job.retries, self._check)
        except RowError as error:
            todo.fail(error)
            return None

    def _answer(self, ready: Sequence[tuple[Todo, Prefix]], on_answer: Callable[[], None]) -> None:
        self._progress.start_documents(list(dict.fromkeys(todo.document_id for todo, _ in ready)))
        try:
            retried(lambda: self._attempt(ready, on_answer), self._job.retries, self._check)
        except GenerationFailed as error:
            if len(ready) == 1:
                ready[0][0].fail(error)
                return
            _log.warning("answering %d documents together failed, so each is tried by itself: %s", len(ready), error)
            for one in ready:
                self._answer([one], on_answer)

    def _attempt(self, ready: Sequence[tuple[Todo, Prefix]], on_answer: Callable[[], None]) -> None:
        shown = self._shown
        try:
            with _timed(self._report, "answer_seconds"):
                self._engine.answer(ready, on_answer)
        except GenerationFailed:
            self._progress.rows_done(shown - self._shown)
            self._shown = shown
            raise

    def _commit(self, group: Sequence[Todo]) -> None:
        """Count what became of a group, and have it written while the next is computed."""
        rows = [row for todo in group for row in todo.rows.values()]
        failed = [row for row in rows if row.status == "error"]
        report = self._report
        report.rows_answered += len(rows) - len(failed)
        for row in [*failed, *(row for todo in group for row in todo.kept if row.status == "error")]:
            report.add_failure(str(row.error_type), row.failure)
        report.answer_tokens += sum(row.answer_tokens or 0 for row in rows)
        report.documents_done += len(group)
        report.documents_truncated += sum(todo.truncated for todo in group)
        report.documents_split += sum(bool(todo.windows) for todo in group)
        self._progress.rows_done(len(rows) - self._shown)
        self._shown = 0
        self._wait()
        self._written = self._writer.submit(self._write, group, report.copy())
        if failed and self._on_failure.stop:
            raise StoppedAtFailure(failed[0].failure)

    def _write(self, group: Sequence[Todo], report: Report) -> None:
        changed = [todo for todo in group if todo.queries]
        if changed:
            self._results.commit(
                {todo.document_id: [*todo.kept, *(todo.rows[query.id] for query in todo.queries)] for todo in changed}
            )
        self._progress.end_documents([todo.document_id for todo in group], report)
        self._committed(report)
        if self._loaded is None:
            return
        for todo in group:
            if todo.rendered is not None and todo.succeeded:
                self._needs.done(todo.label)
                if todo.queries and self._job.cache.keep == "job":
                    self._drop(self._loaded.store, self._loaded.own_keys(todo))

    def _wait(self) -> None:
        """Until what was last to be written is. Raises OutputError where the disk refused."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def finish(self, done: bool) -> None:
        """The run is over, and the job as well if ``done``."""
        if self._loaded is None and not done:
            return
        if self._loaded is not None and done and self._renderer.shared:
            self._needs.done(context_label(self._renderer.shared))
        if done and self._job.cache.keep == "job":  # a run before this one may have been killed when all was answered
            store = self._loaded.store if self._loaded is not None else self._open_store()
            self._drop(store)
        self._needs.finish()

    def _drop(self, store: Store, keys: Collection[str] | None = None) -> None:
        """Remove segments that this job built, all unless ``keys`` are given; another may want to keep its own."""
        own = output_digest(self._job.result_file)
        store.drop(lambda entry: entry.about.get("output") == own and (keys is None or entry.key in keys))

    @property
    def _engine(self) -> Engine:
        if self._loaded is None:
            from pipeline.engine import Engine

            store = self._open_store()
            self._needs.start(self._labels_to_come(), store.make_room)
            shared, schemas = self._renderer.shared, self._inputs.schemas
            self._loaded = Engine(
                self._job, self._identity, store, shared, schemas, self._progress, self._report, self._check
            )
        return self._loaded

    def _open_store(self) -> Store:
        from pipeline.store import open_store

        return open_store(self._job.cache, self._needs.wants)

    def _labels_to_come(self) -> Iterator[str]:
        if self._renderer.shared:
            yield context_label(self._renderer.shared)
        for document in islice(self._inputs.stream(), self._report.documents_done, None):
            with suppress(RowError):
                yield context_label(self._renderer.render(document))

    def _answered(self) -> None:
        self._shown += 1
        self._progress.rows_done(1)


@contextmanager
def _timed(report: Report, name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        setattr(report, name, getattr(report, name) + time.monotonic() - started)
