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
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.documents import Document
from pipeline.errors import ContextTooLong, GenerationFailed, ModelProcessDied, RowError, StoreError, one_line
from pipeline.identity import cache_codec, context_label, kept_rows, row_fingerprints
from pipeline.job import Job, Query
from pipeline.progress import Watcher
from pipeline.prompts import Rendered, Renderer, TokenisedDocument
from pipeline.report import Report
from pipeline.results import Results, Row

if TYPE_CHECKING:
    from pipeline.answers import Answer
    from pipeline.model import LoadedModel
    from pipeline.prompts import PromptTokenizer
    from pipeline.store import Store
    from turboquant import Prefix
    from turboquant.identity import Identity
    from turboquant.segments import Segment

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
        self._codec = cache_codec(job.cache)
        self._loaded: _Engine | None = None
        self._can_store = True
        self._shown = 0  # rows in hand that the progress counts already

    @property
    def _engine(self) -> _Engine:
        if self._loaded is None:
            self._loaded = _Engine(self._job)
        return self._loaded

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
        if pending:
            rows = self._answer(document.id, rendered, pending, fingerprints)
            self._commit(document.id, list(kept.values()), rows)

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
        """The document's prefix, restored or built and stored."""
        from pipeline.prefill import prefill
        from turboquant.segments import join

        key, label = self._identity.key(context), context_label(rendered)
        report, store = self._report, self._engine.store
        report.context_tokens += len(context)
        with _timed(report, "restore_seconds"):
            segment = store.load(key, self._codec, self._identity, label)
        if segment is not None:
            report.prefixes_restored += 1
        else:
            self._check()
            self._progress.start_prefill(document_id, len(context))
            with _timed(report, "prefill_seconds"):
                try:
                    segment = prefill(self._engine.loaded.model, context, self._codec, self._prefilled)
                except (RuntimeError, ValueError, MemoryError) as error:
                    raise GenerationFailed(f"the prefill failed: {one_line(error)}") from error
                finally:
                    self._progress.end_prefill()
            report.prefixes_built += 1
            report.prefilled_tokens += len(context)
            self._save(key, segment, label)
        prefix = join([segment])
        report.prefix_bytes += prefix.nbytes
        prefixes = report.prefixes_built + report.prefixes_restored
        report.effective_bits += (prefix.effective_bits - report.effective_bits) / prefixes
        return prefix

    def _prefilled(self, tokens: int) -> None:
        self._check()
        self._progress.prefilled(tokens)

    def _answered(self) -> None:
        self._shown += 1
        self._progress.rows_done(1)

    def _save(self, key: str, segment: Segment, label: str) -> None:
        """Store a prefix; where the disk refuses, the job goes on without."""
        try:
            self._engine.store.save(key, segment, self._identity, label)
        except StoreError as error:
            if self._can_store:
                _log.warning("%s; the job goes on without storing prefixes where that fails", error)
            self._can_store = False


class _Engine:
    """The model, its tokenizer and the store: everything that is slow to load."""

    def __init__(self, job: Job) -> None:
        from pipeline.model import load_model, max_context
        from pipeline.prefill import warn_of_uncompressed_layers
        from pipeline.prompts import PromptTokenizer
        from pipeline.store import Store
        from turboquant.blas import load_tuned_blas

        if hint := load_tuned_blas().hint:
            _log.warning("MLX computes with a slow BLAS here: %s", hint)
        self.loaded: LoadedModel = load_model(job.model)
        self.tokenizer: PromptTokenizer = PromptTokenizer(self.loaded.tokenizer)
        self.limit = max_context(self.loaded.config, self.loaded.tokenizer)
        self.store: Store = Store(job.cache.dir)
        warn_of_uncompressed_layers(self.loaded.model)


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
