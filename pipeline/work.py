"""One document's work: what is left to answer, its prefix, its answers, its part.

Knows the order of things for a document and what becomes of it when one fails; how each thing is done is the other
modules'. The model is loaded only when the first row turns out to need it. Rows are committed a document at a time,
and a document cut off midway is answered again whole, so that which rows share a batch never depends on where a run
was interrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.budget import budget_bytes
from pipeline.documents import Document, stream_documents
from pipeline.errors import ContextTooLong, GenerationFailed, ModelProcessDied, RowError, one_line
from pipeline.identity import context_label, kept_rows, row_fingerprints
from pipeline.job import Job, Query
from pipeline.needs import Needs, output_digest
from pipeline.progress import Watcher
from pipeline.prompts import Rendered, Renderer, TokenisedDocument, template_columns
from pipeline.report import Report
from pipeline.results import Results, Row

if TYPE_CHECKING:
    from pipeline.answers import Answer
    from pipeline.inventory import Entry
    from pipeline.model import LoadedModel
    from pipeline.prompts import PromptTokenizer
    from pipeline.store import Store
    from turboquant import Prefix
    from turboquant.identity import Identity

_log = logging.getLogger(__name__)


class Work:
    """What is done with each document of a run.

    ``check`` raises Interrupted where the user asked to stop. ``condemned`` are the documents that the model is not to
    see again, each with what happened.
    """

    def __init__(
        self,
        job: Job,
        identity: Identity,
        results: Results,
        progress: Watcher,
        report: Report,
        check: Callable[[], None],
        condemned: Mapping[str, str],
    ) -> None:
        self._job, self._identity, self._results = job, identity, results
        self._progress, self._report, self._check = progress, report, check
        self._condemned = condemned
        self._renderer = Renderer(job.prompt)
        self._needs = Needs(job.cache.dir, job.output.path)
        self._loaded: _Engine | None = None
        self._shown = 0  # rows in hand that the progress counts already

    @property
    def _engine(self) -> _Engine:
        if self._loaded is None:
            store = _open_store(self._job, self._needs)
            self._needs.start(self._labels_to_come(), store.make_room)
            self._loaded = _Engine(
                self._job,
                self._identity,
                store,
                self._renderer.shared,
                self._progress,
                self._report,
                self._check,
            )
        return self._loaded

    def _labels_to_come(self) -> Iterator[str]:
        if self._renderer.shared:
            yield context_label(self._renderer.shared)
        documents = stream_documents(self._job.documents, template_columns(self._job.prompt))
        for document in islice(documents, self._report.documents_done, None):
            with suppress(RowError):
                yield context_label(self._renderer.render(document))

    def do(self, document: Document) -> None:
        """Answer and commit what is left of a document."""
        try:
            rendered = self._renderer.render(document)
        except RowError as error:
            self._commit(document.id, [], [_failed(document.id, q, "", error) for q in self._job.queries])
            return
        fingerprints = row_fingerprints(self._identity, rendered, self._job)
        kept = kept_rows(self._results.rows(document.id), fingerprints)
        pending = [query for query in self._job.queries if query.id not in kept]
        self._report.rows_kept += len(kept)
        self._progress.rows_done(len(kept))
        rows: list[Row] = []
        if pending:
            rows = self._answer(document.id, rendered, pending, fingerprints)
            self._commit(document.id, list(kept.values()), rows)
        if self._loaded is not None and all(row.status == "ok" for row in rows):
            self._needs.done(context_label(rendered))
            if pending and self._job.cache.keep == "job":
                keys = self._loaded.prefixes.own_keys
                self._drop(self._loaded.store, lambda entry: entry.key in keys)

    def finish(self, done: bool) -> None:
        """The run is over, and the job as well if ``done``."""
        if self._loaded is None and not done:
            return
        if self._loaded is not None and done and self._renderer.shared:
            self._needs.done(context_label(self._renderer.shared))
        if done and self._job.cache.keep == "job":  # a run before this one may have been killed when all was answered
            store = self._loaded.store if self._loaded is not None else _open_store(self._job, self._needs)
            self._drop(store, lambda entry: True)
        self._needs.finish()

    def _drop(self, store: Store, matches: Callable[[Entry], bool]) -> None:
        """Remove segments that this job built; another may want to keep its own."""
        own = output_digest(self._job.output.path)
        store.drop(lambda entry: entry.about.get("output") == own and matches(entry))

    def _commit(self, document_id: str, kept: Sequence[Row], rows: Sequence[Row]) -> None:
        self._results.commit(document_id, [*kept, *rows])
        failed = [row for row in rows if row.status == "error"]
        self._report.rows_failed += len(failed)
        self._report.rows_answered += len(rows) - len(failed)
        for kind in (str(row.error_type) for row in failed):
            self._report.failures[kind] = self._report.failures.get(kind, 0) + 1
        self._report.answer_tokens += sum(row.answer_tokens or 0 for row in rows)
        self._progress.rows_done(len(rows) - self._shown)
        self._shown = 0

    def _answer(
        self, document_id: str, rendered: Rendered, pending: Sequence[Query], fingerprints: dict[str, str]
    ) -> list[Row]:
        """One row for each pending query."""
        if document_id in self._condemned:
            died = ModelProcessDied(self._condemned[document_id])
            return [_failed(document_id, query, fingerprints[query.id], died) for query in pending]
        engine = self._engine  # loaded before the document is begun, which is not to blame where loading fails
        self._progress.start_document(document_id)
        try:
            tokens = engine.tokenizer.tokenise(rendered, [query.text for query in self._job.queries])
        except RowError as error:
            return [_failed(document_id, query, fingerprints[query.id], error) for query in pending]
        suffixes = {query.id: suffix for query, suffix in zip(self._job.queries, tokens.suffixes, strict=True)}
        rows: dict[str, Row] = {}
        fitting: list[Query] = []
        for query in pending:
            row = Row(
                document_id,
                query.id,
                "ok",
                fingerprints[query.id],
                context_tokens=len(tokens.context),
                query_tokens=len(suffixes[query.id]),
            )
            rows[query.id] = row
            if too_long := self._too_long(tokens, suffixes[query.id], query):
                rows[query.id] = _with_error(row, too_long)
            else:
                fitting.append(query)
        if fitting:
            try:
                answers = self._generate(document_id, rendered, tokens.context, fitting, suffixes)
            except RowError as error:
                rows |= {query.id: _with_error(rows[query.id], error) for query in fitting}
            else:
                for query, answer in zip(fitting, answers, strict=True):
                    rows[query.id] = replace(
                        rows[query.id],
                        answer=answer.text,
                        finish_reason=answer.finish_reason,
                        answer_tokens=answer.tokens,
                    )
        return [rows[query.id] for query in pending]

    def _too_long(self, tokens: TokenisedDocument, suffix: Sequence[int], query: Query) -> ContextTooLong | None:
        limit, longest = self._engine.limit, query.settings(self._job.generation).max_tokens
        needed = len(tokens.context) + len(suffix) + longest
        if limit is None or needed <= limit:
            return None
        return ContextTooLong(
            f"{len(tokens.context):,} tokens of context, {len(suffix):,} of the query and up to {longest:,} of the "
            f"answer are {needed:,}; the model reads {limit:,}"
        )

    def _generate(
        self,
        document_id: str,
        rendered: Rendered,
        context: list[int],
        queries: Sequence[Query],
        suffixes: dict[str, list[int]],
    ) -> list[Answer]:
        from pipeline.answers import Request, answer

        prefix = self._prefix(document_id, rendered, context)
        requests = [
            Request(
                suffixes[query.id],
                query.settings(self._job.generation),
                f"{document_id}\0{query.id}",
            )
            for query in queries
        ]
        with _timed(self._report, "answer_seconds"):
            try:
                return answer(
                    self._engine.loaded,
                    prefix.resident(self._job.cache.resident),
                    requests,
                    self._job.generation.batch_size,
                    self._answered,
                )
            except (RuntimeError, ValueError, MemoryError) as error:
                raise GenerationFailed(f"the model failed: {one_line(error)}") from error

    def _prefix(self, document_id: str, rendered: Rendered, context: list[int]) -> Prefix:
        shared, label = self._engine.shared, context_label(rendered)
        length = len(shared) if context[: len(shared)] == shared else 0
        return self._engine.prefixes.prefix(document_id, context, length, label)

    def _answered(self) -> None:
        self._shown += 1
        self._progress.rows_done(1)


class _Engine:
    """The model, its tokenizer, the store and what is restored from it: everything that is slow to load."""

    def __init__(
        self,
        job: Job,
        identity: Identity,
        store: Store,
        shared: Rendered | None,
        progress: Watcher,
        report: Report,
        check: Callable[[], None],
    ) -> None:
        from pipeline.model import load_model, max_context
        from pipeline.prefill import warn_of_uncompressed_layers
        from pipeline.prefixes import Prefixes
        from pipeline.prompts import PromptTokenizer
        from turboquant.blas import load_tuned_blas

        if hint := load_tuned_blas().hint:
            _log.warning("MLX computes with a slow BLAS here: %s", hint)
        self.loaded: LoadedModel = load_model(job.model)
        self.tokenizer: PromptTokenizer = PromptTokenizer(self.loaded.tokenizer)
        self.limit = max_context(self.loaded.config, self.loaded.tokenizer)
        warn_of_uncompressed_layers(self.loaded.model)
        self.store = store
        self.shared = self.tokenizer.shared_tokens(shared) if shared else []
        about = {"model": job.model, "output": output_digest(job.output.path)}
        shared_label = context_label(shared) if shared else ""
        self.prefixes: Prefixes = Prefixes(
            job, identity, self.loaded, self.store, about, progress, report, check, shared_label
        )


def _open_store(job: Job, needs: Needs) -> Store:
    from pipeline.store import Store

    budget = None if job.cache.budget is None else budget_bytes(job.cache.budget, job.cache.dir)
    return Store(job.cache.dir, budget, needs.wants)


def _failed(document_id: str, query: Query, fingerprint: str, error: RowError) -> Row:
    return _with_error(Row(document_id, query.id, "ok", fingerprint), error)


def _with_error(row: Row, error: RowError) -> Row:
    return replace(row, status="error", error_type=error.error_type, error=str(error))


@contextmanager
def _timed(report: Report, name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        setattr(report, name, getattr(report, name) + time.monotonic() - started)
