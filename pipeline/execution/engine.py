"""The engine answers groups of documents with one loaded model: tokenise, restore or prefill, decode.

It is the same in the process of a local run and in a worker on another machine. It does not know where tasks come from
or what happens to results.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.cache.store import Store
from pipeline.errors import CheckFailed, ContextTooLong, GenerationFailed, RowError, UnknownToken, one_line
from pipeline.execution.asking import Asker
from pipeline.execution.context import RunContext
from pipeline.execution.decode import Request, generate_answers, row_name
from pipeline.execution.fingerprint import context_label, load_identified
from pipeline.execution.prefixes import PrefixProvider
from pipeline.execution.prepared import PreparedPrompt, PreparedTask
from pipeline.execution.task import DocumentTask, TaskResult, error_row
from pipeline.inputs.prompts import PromptTokenizer, Rendered, Renderer
from pipeline.inputs.questions import chain_of
from pipeline.inputs.windows import WindowCutter, combined, too_long
from pipeline.job.job import Query, Settings
from pipeline.models.loading import LoadedModel, max_context
from pipeline.models.output_parser import OutputParser
from pipeline.models.quotations import Passages
from pipeline.models.ranks import common_values
from pipeline.output.rows import Row
from pipeline.report import WorkStats
from pipeline.retry import attempts
from turboquant import Prefix
from turboquant.caches.prefix import make_resident
from turboquant.kernels.programs import summary as kernel_origins
from turboquant.mlx_lm.families import BATCHING_MESSAGES, explain
from turboquant.runtime.blas import blas_in_use
from turboquant.runtime.device import on_cpu

# Behind a question whose answer was refused, when it is asked again.
REFUSED = 'The answer "{answer}" is refused, because this is not true of it: {check}. Give another answer.'
_log = logging.getLogger(__name__)


class Engine:
    """A job's model and store, loaded. ``stats`` of the work are taken with ``take_stats``.

    With several ranks, this is the first of them; the other ranks repeat its steps with their parts of the model (see
    rank_worker.py).
    """

    def __init__(self, context: RunContext, store: Store) -> None:
        if hint := blas_in_use().hint:
            _log.warning("MLX computes with a slow BLAS here: %s", hint)
        job = context.job
        self._context, self._job, self._ranks = context, job, context.ranks
        begin = {"common": common_values(context.identity), "schemas": sorted(context.schemas)}
        started = time.monotonic()
        with self._ranks.step("begin", begin):
            self._model: LoadedModel = load_identified(job, context.identity, self._ranks)
        load_seconds = time.monotonic() - started
        self._window_cutter, self._asker = WindowCutter(job), Asker(job, context.identity)
        self._tokenizer = PromptTokenizer(
            self._model.tokenizer, bool(job.generation.thinking), job.prompt.special_tokens
        )
        self._parser = OutputParser(self._model.tokenizer, context.schemas)
        if job.cache.coding == "trellis" and on_cpu():
            _log.warning(
                "cache.coding: trellis is for GPUs: this CPU takes minutes to encode a prefix, where scalar codes take "
                "seconds. Prefixes that the store already has need not be encoded"
            )
        self._limit = max_context(self._model.config, self._model.tokenizer)
        if job.prompt.system and self._tokenizer.folds_system:
            _log.warning("the chat template takes no system text: it is put before the document in the user's message")
        if (known := self._model.known_tokens) is not None:
            _log.warning(
                "the tokenizer has more tokens than the %d of the model's embedding: rows with them fail", known
            )
        for message in (explain(self._model.model).message, BATCHING_MESSAGES[self._model.batching]):
            if message:
                _log.warning("%s", message)
        shared = Renderer(job.prompt, job.documents).shared
        self._shared_tokens = self._tokenizer.shared_tokens(shared) if shared else []
        self.store = store
        self._prefixes = PrefixProvider(context, self._model, store, context_label(shared) if shared else "")
        self._prefixes.stats.load_seconds = load_seconds
        self._rows_shown = 0  # rows of the current group that the observer counts already

    def take_stats(self) -> WorkStats:
        """Return the statistics of the work since the last call."""
        stats, self._prefixes.stats = self._prefixes.stats, WorkStats()
        return stats

    # ---- before a group's turn, in another thread

    def prepare(self, task: DocumentTask) -> PreparedTask:
        """Tokenise a task's prompts and restore what the store has of its prefix. May be called by any thread.

        A document that is too long becomes windows, if the job says so. Queries that cannot be answered fail.
        """
        prepared = PreparedTask(task)
        if task.rendered is None or not task.open_queries:
            return prepared
        try:
            windows = self._window_cutter.windows(
                task.document, task.rendered, self._tokenizer, self._limit, self._context.check
            )
        except RowError as error:
            prepared.failure = error
            prepared.rows |= task.failures(error)
            return prepared
        prepared.prompts = [self._tokenise(task, window, task.asked) for window in windows]
        if not prepared.is_split:
            (prompt,) = prepared.prompts
            prepared.truncated = windows[0] is not task.rendered
            if prompt.open_queries:
                prompt.restored = self._prefixes.restore(prompt.pieces)
        return prepared

    def _tokenise(self, task: DocumentTask, rendered: Rendered, queries: Sequence[Query]) -> PreparedPrompt:
        prompt, document = PreparedPrompt(task, [], rendered=rendered), task.document
        self._context.check()
        limit = self._limit
        if limit is not None and (beyond := self._tokenizer.estimate_beyond(rendered.context, limit)):
            prompt.failure = ContextTooLong(f"about {beyond:,} tokens of context; the model reads {limit:,}")
        else:
            # Where the context ends must not depend on answers, which are not known when it is needed first.
            chain = chain_of(document.queries)
            first = [query.id for query in document.queries if query.id in task.questions and not chain.uses(query.id)]
            try:
                texts = [task.questions[query_id].text for query_id in first]
                tokens = self._tokenizer.tokenise(rendered, texts, self._context.check)
                prompt.context = tokens.context
                prompt.suffixes = dict(zip(first, tokens.suffixes, strict=True))
                shared = self._shared_length(tokens.context)
                prompt.pieces = self._prefixes.cut(document.id, tokens.context, shared, task.label)
            except RowError as error:
                prompt.failure = error
        self._add_queries(prompt, queries)
        return prompt

    def _add_queries(self, prompt: PreparedPrompt, queries: Sequence[Query]) -> None:
        """Add queries to a prompt, tokenised. A query that cannot be answered fails."""
        for query in queries:
            prompt.queries.append(query)
            if failure := prompt.failure or self._tokenise_query(prompt, query):
                prompt.fail(failure, [query])

    def _tokenise_query(self, prompt: PreparedPrompt, query: Query) -> RowError | None:
        """Make the suffix of a query, if it is not there yet. Return an error if the model cannot read it."""
        assert prompt.rendered is not None
        if query.id not in prompt.suffixes:
            try:
                question = prompt.task.questions[query.id]
                prompt.suffixes[query.id] = self._tokenizer.suffix(prompt.rendered, question, prompt.context)
            except RowError as error:
                return error
        suffix, settings = prompt.suffixes[query.id], query.settings(self._job.generation)
        return self._unknown_token([*prompt.context, *suffix]) or too_long(
            len(prompt.context), len(suffix), settings, self._limit
        )

    def _unknown_token(self, tokens: Sequence[int]) -> UnknownToken | None:
        """Return an error if the model has no vector for a token: it would compute with foreign memory, or crash."""
        limit = self._model.known_tokens
        if limit is None or max(tokens) < limit:
            return None
        text = self._model.tokenizer.decode([max(tokens)])
        return UnknownToken(
            f"token {max(tokens)} ({text!r}): the model's embedding ends at {limit - 1:,}; "
            "use the tokenizer that the model was trained with, or a model whose embedding was resized"
        )

    def _shared_length(self, context: Sequence[int]) -> int:
        """Return how many of a context's first tokens all documents have."""
        shared = self._shared_tokens
        return len(shared) if context[: len(shared)] == shared else 0

    # ---- a group's turn

    def answer(self, group: Sequence[PreparedTask]) -> list[TaskResult]:
        """Answer all open queries of a group of documents. A row that fails becomes an error row.

        Raises Interrupted, and DiskFull if there is no room on the disk.
        """
        observer = self._context.observer
        self._rows_shown = 0
        for prepared in group:
            if prepared.is_split:
                self._answer_windows(prepared)
        # Queries that use answers are asked when these are there, those of all documents together.
        prefixes: dict[str, list[tuple[PreparedPrompt, Prefix]]] = {}
        while ready := self._ready(group, prefixes):
            self._decode(ready, self._show_row)
        self._prefixes.wait_until_stored()
        results = [prepared.result(self._prefixes.shared_label) for prepared in group]
        observer.rows_done(sum(len(result.rows) for result in results) - self._rows_shown)
        return results

    def _ready(
        self, group: Sequence[PreparedTask], prefixes: dict[str, list[tuple[PreparedPrompt, Prefix]]]
    ) -> list[tuple[PreparedPrompt, Prefix]]:
        """Return the prompts that have queries to decode now, with their prefixes, which are added to `prefixes`."""
        ready = []
        for prepared in group:
            self._check_answers(prepared.prompts if not prepared.is_split else ())
            while self._go_on(prepared):
                pass
            if not prepared.is_split and prepared.prompts and prepared.prompts[0].open_queries:
                name, prompt = prepared.task.document_id, prepared.prompts[0]
                if not prefixes.get(name):  # the prefixes before it are in memory too, so they may be to blame as well
                    self._context.observer.documents_started([*(other for other in prefixes if prefixes[other]), name])
                    prefixes[name] = self._with_prefix(prompt)
                ready += prefixes[name]
        return ready

    def _check_answers(self, prompts: Sequence[PreparedPrompt]) -> bool:
        """Check the new answers. A query whose answer is refused is asked again, or fails. Return whether any is."""
        is_open = False
        for prompt in prompts:
            for query in prompt.queries:
                row, refused = prompt.rows.get(query.id), prompt.refusals.get(query.id, 0)
                if query.check is None or row is None or row.status != "ok" or query.id in prompt.accepted:
                    continue
                reason = self._asker.refusal(prompt.task, query, row)
                if reason is None:
                    prompt.accepted.add(query.id)
                elif refused == query.retries:
                    asked = f"asked {refused + 1} times" if refused else "asked once"
                    failure = CheckFailed(f"the answer is not as check wants it: {reason}; {asked}")
                    prompt.rows[query.id] = error_row(row, failure)
                else:
                    prompt.refusals[query.id] = refused + 1
                    self._ask_again(prompt, query, row.answer or "", reason)
                    is_open |= query.id not in prompt.rows
        return is_open

    def _ask_again(self, prompt: PreparedPrompt, query: Query, answer: str, reason: str) -> None:
        """Open a query again, with its refused answer and the reason behind the question."""
        assert prompt.rendered is not None
        question = prompt.task.questions[query.id]
        text = f"{question.text}\n\n{REFUSED.format(answer=answer, check=reason)}"
        del prompt.rows[query.id]
        try:
            again = replace(question, text=text)
            prompt.suffixes[query.id] = self._tokenizer.suffix(prompt.rendered, again, prompt.context)
            failure: RowError | None = self._tokenise_query(prompt, query)
        except RowError as error:
            failure = error
        if failure is not None:
            prompt.fail(failure, [query])

    def _settings(self, prompt: PreparedPrompt, query: Query) -> Settings:
        """Return the settings of a query, with another seed each time that it is asked again."""
        settings = query.settings(self._job.generation)
        return replace(settings, seed=settings.seed + prompt.refusals.get(query.id, 0))

    def _go_on(self, prepared: PreparedTask) -> bool:
        """Ask the queries whose answers that they use are there by now. Return whether there are any."""
        task = prepared.task
        if not task.waiting:
            return False
        rows = {row.query_id: row for row in task.kept} | prepared.all_rows
        prepared.task, decided = self._asker.go_on(task, rows)
        prepared.rows |= decided
        new = [query for query in prepared.task.asked if query.id not in task.questions]
        for prompt in prepared.prompts:
            prompt.task = prepared.task
            self._add_queries(prompt, new)
        if prepared.failure:
            prepared.rows |= {query.id: error_row(prepared.task.row(query), prepared.failure) for query in new}
        return bool(new)

    def _answer_windows(self, prepared: PreparedTask) -> None:
        """Answer each query on each window, then once more from its answers on all windows."""
        tokens = sum(len(window.context) for window in prepared.prompts)
        is_new = True
        while is_new:
            for window in prepared.prompts:
                self._context.observer.documents_started([prepared.task.document_id])
                if window.open_queries:
                    self._decode(self._with_prefix(window), lambda: None)
            parts = self._combine(prepared)
            self._decode([each for part in parts for each in self._with_prefix(part)], self._show_row)
            while self._check_answers(parts):
                self._decode([each for part in parts for each in self._with_prefix(part)], self._show_row)
            for part in parts:
                prepared.rows |= {query_id: replace(row, context_tokens=tokens) for query_id, row in part.rows.items()}
            prepared.combined += parts
            is_new = self._go_on(prepared)

    def _combine(self, prepared: PreparedTask) -> list[PreparedPrompt]:
        """Return the prompts that combine the answers on windows. A query that failed on a window fails."""
        task, parts = prepared.task, []
        for query in task.asked:
            if query.id in prepared.rows:
                continue
            rows = [window.rows[query.id] for window in prepared.prompts]
            failed = next((number for number, row in enumerate(rows) if row.status == "error"), None)
            if failed is not None:
                error = f"window {failed + 1} of {len(rows)}: {rows[failed].error}"
                prepared.rows[query.id] = replace(rows[failed], error=error)
            elif task.rendered is not None:
                answers = combined(task.rendered, [_with_evidence(row) for row in rows])
                part = self._tokenise(task, answers, [query])
                quotes = (quotation["quote"] for row in rows for quotation in row.evidence or ())
                part.quotations = Passages(tuple(dict.fromkeys(quotes)), whole=True)
                parts.append(part)
        return parts

    def _with_prefix(self, prompt: PreparedPrompt) -> list[tuple[PreparedPrompt, Prefix]]:
        """Return the prompt with its prefix, restored or built; nothing if that fails."""
        if not prompt.open_queries:
            return []
        restored, prompt.restored = prompt.restored, None
        build = {
            "key": prompt.pieces[-1].key,
            "document": prompt.task.document_id,
            "context": prompt.context,
            "shared": self._shared_length(prompt.context),
            "label": prompt.task.label,
        }
        try:
            for attempt in attempts(self._job.retries, self._context.check):
                with attempt, self._ranks.step("build", build):
                    return [(prompt, self._prefixes.get(prompt.pieces, restored))]
        except RowError as error:
            prompt.fail(error)
        return []

    def _decode(self, ready: Sequence[tuple[PreparedPrompt, Prefix]], on_row: Callable[[], None]) -> None:
        """Decode all open queries of prompts together. If that fails, each prompt is tried alone."""
        if not ready:
            return
        self._context.observer.documents_started(list(dict.fromkeys(prompt.task.document_id for prompt, _ in ready)))
        try:
            for attempt in attempts(self._job.retries, self._context.check):
                with attempt:
                    self._decode_once(ready, on_row)
        except GenerationFailed as error:
            if len(ready) == 1:
                ready[0][0].fail(error)
                return
            _log.warning("answering %d documents together failed, so each is tried by itself: %s", len(ready), error)
            for one in ready:
                self._decode([one], on_row)

    def _decode_once(self, ready: Sequence[tuple[PreparedPrompt, Prefix]], on_row: Callable[[], None]) -> None:
        prefixes = make_resident([prefix for _, prefix in ready], self._job.cache.resident)
        asked = [(number, prompt, query) for number, (prompt, _) in enumerate(ready) for query in prompt.open_queries]
        requests = [
            Request(
                prefixes[number],
                prompt.suffixes[query.id],
                self._settings(prompt, query),
                row_name(prompt.task.document_id, query.id),
                prompt.passages if query.settings(self._job.generation).wants_evidence else None,
            )
            for number, prompt, query in asked
        ]
        keys = [prompt.pieces[-1].key for prompt, _ in ready]
        described = [
            [number, request.tokens, vars(request.settings), request.name, request.passages and vars(request.passages)]
            for (number, _, _), request in zip(asked, requests, strict=True)
        ]
        stats, shown, batch_size = self._prefixes.stats, self._rows_shown, self._job.generation.batch_size
        try:
            with stats.timed("answer"), self._ranks.step("answer", {"prefixes": keys, "requests": described}):
                answers = generate_answers(self._model, requests, self._parser, batch_size, on_row, self._ranks)
        except (RuntimeError, ValueError, MemoryError) as error:
            self._context.observer.rows_done(shown - self._rows_shown)  # they are answered again, or become errors
            self._rows_shown = shown
            may_pass = not isinstance(error, ValueError)
            raise GenerationFailed(f"the model failed: {one_line(error)}", may_pass) from error
        stats.batching = self._model.batching
        stats.attention, stats.kernels = prefixes[0].attended_by, kernel_origins()
        for prefix in prefixes:
            how = "dense" if prefix.is_dense else "packed"
            stats.resident[how] = stats.resident.get(how, 0) + 1
        for (_, prompt, query), answer in zip(asked, answers, strict=True):
            prompt.accept(query, answer)

    def _show_row(self) -> None:
        self._rows_shown += 1
        self._context.observer.rows_done(1)


def _with_evidence(row: Row) -> str:
    """Return an answer on a window with its quotations, as it is shown where answers are combined."""
    return "\n".join([row.answer or "", *(f'"{quotation["quote"]}"' for quotation in row.evidence or ())])
