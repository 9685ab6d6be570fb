"""What is slow to load and needed only where there is something to answer: model, tokenizer and store.

Knows how a document becomes tokens, a prefix and answers; not what becomes of those.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from pipeline.cache.pins import output_digest
from pipeline.cache.store import Store
from pipeline.errors import ContextTooLong, GenerationFailed, RowError, one_line
from pipeline.inputs.prompts import PromptTokenizer, Rendered
from pipeline.inputs.windows import WindowCutter, combined
from pipeline.job.job import Job, Query
from pipeline.models.loading import LoadedModel, load_model, max_context
from pipeline.models.output_parser import OutputParser
from pipeline.models.ranks import common_values, meet
from pipeline.progress import RunObserver
from pipeline.report import Report
from pipeline.run.decode import Request, answer, row_name
from pipeline.run.fingerprint import cache_codec, context_label
from pipeline.run.prefill import warn_of_uncompressed_layers
from pipeline.run.prefixes import Prefixes
from pipeline.run.task import DocumentTask, Tokenised
from turboquant import Prefix
from turboquant.caches.prefix import make_resident
from turboquant.io.identity import Identity
from turboquant.kernels.programs import summary as kernel_origins
from turboquant.runtime.blas import blas_in_use

_log = logging.getLogger(__name__)


class Engine:
    """A job's model and store, loaded.

    shared: what all documents have in common. schemas: those that answers may follow. check: raises Interrupted where
    the user asked to stop. Where other processes hold the model too, this is the first of them, and the others do with
    their parts what it does.
    """

    def __init__(
        self,
        job: Job,
        identity: Identity,
        store: Store,
        shared: Rendered | None,
        schemas: Collection[str],
        progress: RunObserver,
        report: Report,
        check: Callable[[], None],
    ) -> None:
        if hint := blas_in_use().hint:
            _log.warning("MLX computes with a slow BLAS here: %s", hint)
        self._job, self._report = job, report
        self._ranks = meet(job.scale.ranks)
        with self._ranks.step("begin", {"ground": common_values(identity), "schemas": sorted(schemas)}):
            self._model: LoadedModel = load_model(
                job.model, job.revision, job.adapter, job.trust_remote_code, self._ranks, cache_codec(job.cache)
            )
        self._fitting = WindowCutter(job)
        self._tokenizer = PromptTokenizer(self._model.tokenizer, bool(job.generation.thinking))
        self._reader = OutputParser(self._model.tokenizer, schemas)
        self._limit = max_context(self._model.config, self._model.tokenizer)
        if job.prompt.system and self._tokenizer.folds_system:
            _log.warning("the chat template takes no system text: it is put before the document in the user's message")
        warn_of_uncompressed_layers(self._model.model)
        self._shared = self._tokenizer.shared_tokens(shared) if shared else []
        about = {"model": job.model, "output": output_digest(job.result_file)}
        shared_label = context_label(shared) if shared else ""
        self.store = store
        self._prefixes = Prefixes(
            job, identity, self._model, store, about, progress, report, check, shared_label, self._ranks
        )

    def make_ready(self, todo: DocumentTask) -> None:
        """Tokenise a document's prompts, and restore what the store has of its prefix; from any thread, once.

        One that is to be read in windows gets those. Queries that cannot be answered fail.
        """
        if todo.rendered is None or todo.tokenised is not None or todo.windows or not todo.open:
            return
        try:
            windows = self._fitting.windows(todo.document, todo.rendered, self._tokenizer, self._limit)
        except RowError as error:
            todo.fail(error)
            return
        if len(windows) > 1:
            todo.windows = [self._part(todo, window, todo.open) for window in windows]
            todo.split = True
            return
        todo.truncated = windows[0] is not todo.rendered
        tokenised = self._tokenise(todo, windows[0])
        if tokenised is not None and todo.open:
            tokenised.restored = self._prefixes.restore(tokenised.pieces)

    def combine(self, todo: DocumentTask) -> list[DocumentTask]:
        """What is asked of the answers on a document's windows, query by query; one that failed on a window fails."""
        parts: list[DocumentTask] = []
        for query in todo.open:
            rows = [window.rows[query.id] for window in todo.windows]
            failed = next((number for number, row in enumerate(rows) if row.status == "error"), None)
            if failed is not None:
                told = f"window {failed + 1} of {len(rows)}: {rows[failed].error}"
                todo.rows[query.id] = replace(rows[failed], error=told)
            elif todo.rendered is not None:
                asked = combined(todo.rendered, [row.answer or "" for row in rows])
                parts.append(self._part(todo, asked, [query]))
        return parts

    def _part(self, todo: DocumentTask, rendered: Rendered, queries: Sequence[Query]) -> DocumentTask:
        """A part of what is to be done for a document, ready to be answered."""
        part = DocumentTask(todo.document, rendered, queries, fingerprints=todo.fingerprints, label=todo.label)
        self._tokenise(part, rendered)
        return part

    def _tokenise(self, todo: DocumentTask, rendered: Rendered) -> Tokenised | None:
        queries = todo.document.queries
        try:
            tokens = self._tokenizer.tokenise(rendered, [query.text for query in queries])
        except RowError as error:
            todo.fail(error)
            return None
        context, ids = tokens.context, [query.id for query in queries]
        pieces = self._prefixes.cut(todo.document_id, context, self._common(context), todo.label)
        tokenised = todo.tokenised = Tokenised(context, dict(zip(ids, tokens.suffixes, strict=True)), pieces)
        for query in todo.open:
            suffix, longest = tokenised.suffixes[query.id], query.settings(self._job.generation).max_tokens
            if refused := too_long(len(context), len(suffix), longest, self._limit):
                todo.fail(refused, [query])
        return tokenised

    def _common(self, context: Sequence[int]) -> int:
        """How many of a context's first tokens all documents have."""
        return len(self._shared) if context[: len(self._shared)] == self._shared else 0

    def prefix(self, todo: DocumentTask) -> Prefix:
        """The prefix of a document that is ready. Raises GenerationFailed or DiskFull."""
        tokenised = todo.tokenised
        assert tokenised is not None
        with self._ranks.step(
            "build",
            {
                "key": tokenised.pieces[-1].key,
                "document": todo.document_id,
                "context": tokenised.context,
                "shared": self._common(tokenised.context),
                "label": todo.label,
            },
        ):
            prefix = self._prefixes.prefix(tokenised.pieces, tokenised.restored)
        tokenised.restored = ()
        return prefix

    def settle(self) -> None:
        """Wait until the prefixes that were built are stored. Raises DiskFull where there is no room for them."""
        self._prefixes.settle()

    def own_keys(self, todo: DocumentTask) -> set[str]:
        """The segments that are the document's alone."""
        tokenised = (each.tokenised for each in (todo, *todo.windows, *todo.combined))
        pieces = (piece for each in tokenised if each is not None for piece in each.pieces)
        return {piece.key for piece in pieces if piece.about["label"] != self._prefixes.shared_label}

    def answer(self, ready: Sequence[tuple[DocumentTask, Prefix]], on_answer: Callable[[], None]) -> None:
        """Answer all open queries of documents together, into their rows. Raises GenerationFailed."""
        prefixes = make_resident([prefix for _, prefix in ready], self._job.cache.resident)
        requests: list[Request] = []
        told: list[tuple[int, list[int], dict[str, object], str]] = []  # of the requests, to the other ranks
        asked: list[tuple[DocumentTask, Query]] = []
        keys: list[str] = []
        for number, (todo, _) in enumerate(ready):
            assert todo.tokenised is not None
            keys.append(todo.tokenised.pieces[-1].key)
            for query in todo.open:
                suffix, settings = todo.tokenised.suffixes[query.id], query.settings(self._job.generation)
                name = row_name(todo.document_id, query.id)
                requests.append(Request(prefixes[number], suffix, settings, name))
                told.append((number, suffix, vars(settings), name))
                asked.append((todo, query))
        size = self._job.generation.batch_size
        try:
            with self._ranks.step("answer", {"prefixes": keys, "requests": told}):
                answers = answer(self._model, requests, self._reader, size, on_answer, self._ranks)
        except (RuntimeError, ValueError, MemoryError) as error:
            may_pass = not isinstance(error, ValueError)
            raise GenerationFailed(f"the model failed: {one_line(error)}", may_pass) from error
        self._report.attention, self._report.kernels = prefixes[0].attended_by, kernel_origins()
        for prefix in prefixes:
            how = "dense" if prefix.is_dense else "packed"
            self._report.resident[how] = self._report.resident.get(how, 0) + 1
        for (todo, query), given in zip(asked, answers, strict=True):
            if given.failure is not None:
                todo.fail(given.failure, [query])
            else:
                todo.answer(query, given)


def too_long(context: int, suffix: int, longest: int, limit: int | None) -> ContextTooLong | None:
    """What is wrong with a prompt whose context, suffix and longest answer are more tokens than the model reads."""
    needed = context + suffix + longest
    if limit is None or needed <= limit:
        return None
    return ContextTooLong(
        f"{context:,} tokens of context, {suffix:,} of the query and up to {longest:,} of the "
        f"answer are {needed:,}; the model reads {limit:,}"
    )
