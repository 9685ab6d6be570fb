"""What a run would do, and what has been done: ``plan`` and ``status``, without loading weights.

Reads what a run would read and changes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from pipeline.cache.hit_index import HitIndex, label_number
from pipeline.errors import RowError
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.prompts import PromptTokenizer, Rendered, Renderer
from pipeline.inputs.token_counter import Asked, Effort, Lengths, Questions, TokenCounter
from pipeline.inputs.windows import OVERLAP, WindowCutter, reserved
from pipeline.job.budget import budget_bytes, existing
from pipeline.job.job import Job, Query
from pipeline.job.shards import Shard
from pipeline.models.constraints import check_schemas
from pipeline.models.loading import load_tokenizer, max_context, prefix_bytes, read_config, resolve_model
from pipeline.output.results import Results
from pipeline.progress import watched
from pipeline.run.fingerprint import cache_codec, context_label, job_identity, kept_rows, row_fingerprints
from turboquant.io.identity import Identity

_DOCUMENTS_PER_BATCH = 256
_CHARACTERS_PER_BATCH = 1 << 20


@dataclass(frozen=True)
class Status:
    """Rows by what has become of them."""

    documents: int
    rows: int
    done: int
    failed: int

    @property
    def left(self) -> int:
        """Rows that the next run will work on, failed ones included."""
        return self.rows - self.done


@dataclass(frozen=True)
class Plan:
    """What a run would cost.

    ``unreadable`` and ``too_long`` count documents of which some rows will fail, ``truncated`` and ``split`` those that
    will be cut; ``hits`` counts the documents'
    prefixes that are in the store, ``misses`` those that a run would build. Documents of the same text share one. Where
    there is too much to count, tokens and bytes are ``estimated``, and so is which documents are too long.
    """

    status: Status
    unreadable: int
    too_long: int
    truncated: int
    split: int
    tokens: int
    longest: int
    hits: int
    misses: int
    tokens_to_prefill: int
    bytes_to_store: int
    free_bytes: int
    budget_bytes: int | None = None
    estimated: bool = False


def job_status(job: Job, quiet: bool = True, shard: Shard | None = None) -> Status:
    """Count a job's rows; a row answered under other settings, weights or text counts as left."""
    inputs, rows = Inputs(job, shard), _Rows()
    for document in watched(_documents(job, inputs, job_identity(job, remember=False)), inputs.documents, quiet):
        rows.add(document)
    return rows.status()


def plan_job(job: Job, quiet: bool = True, effort: Effort | None = None, shard: Shard | None = None) -> Plan:
    """Count everything and look each prefix up in the store. Raises JobError for what is wrong."""
    from pipeline.cache.store import Store

    inputs = Inputs(job, shard)
    check_schemas(inputs.schemas)
    path = resolve_model(job.model, job.revision)
    config, identity = read_config(path), job_identity(job, remember=False)
    tokenizer = load_tokenizer(path, job.trust_remote_code)
    prompts = PromptTokenizer(tokenizer, bool(job.generation.thinking))
    counter = TokenCounter(prompts, inputs.documents, effort or Effort())
    stored = HitIndex(Store(job.cache.dir).contexts(identity))
    survey = _Survey(job, config, max_context(config, tokenizer), stored)
    for batch in _batches(watched(_documents(job, inputs, identity), inputs.documents, quiet)):
        survey.add(batch, counter)
    return survey.plan()


class _Rows:
    """Counts rows by what has become of them."""

    def __init__(self) -> None:
        self._documents = self._rows = self._left = self._failed = 0

    def add(self, document: _Document) -> None:
        self._documents += 1
        self._rows += len(document.queries)
        self._left += len(document.pending)
        self._failed += document.failed

    def status(self) -> Status:
        return Status(self._documents, self._rows, self._rows - self._left, self._failed)


class _Survey:
    """Adds documents up to a plan, in a few dozen bytes for each text."""

    def __init__(self, job: Job, config: Mapping[str, Any], limit: int | None, stored: HitIndex) -> None:
        self._job, self._limit, self._stored = job, limit, stored
        self._bytes = lru_cache(maxsize=4096)(partial(prefix_bytes, cache_codec(job.cache), config))
        self._rows = _Rows()
        self._questions = Questions((), ())
        self._questions_of: Sequence[Query] = ()
        self._unreadable = self._too_long = self._cut = self._tokens = self._longest = 0
        self._tokens_to_prefill = self._bytes_to_store = 0
        self._hits: set[int] = set()
        self._misses: set[int] = set()  # documents with the same text share a prefix
        self._estimated = False

    def add(self, batch: Sequence[_Document], counter: TokenCounter) -> None:
        """Count a batch of documents."""
        readable: list[tuple[_Document, int]] = []
        asked: list[Asked] = []
        for document in batch:
            self._rows.add(document)
            if document.rendered is None:
                self._unreadable += 1
                continue
            label = label_number(context_label(document.rendered))
            readable.append((document, label))
            asked.append(Asked(document.rendered, self._asked_of(document), *self._stored.expected(label)))
        for (document, label), lengths in zip(readable, counter.count(asked), strict=True):
            if lengths is None:
                self._unreadable += 1
            else:
                self._add_counted(document, label, lengths)

    def plan(self) -> Plan:
        """What all documents come to."""
        return Plan(
            status=self._rows.status(),
            unreadable=self._unreadable,
            too_long=self._too_long,
            truncated=self._cut if self._job.documents.too_long == "truncate" else 0,
            split=self._cut if self._job.documents.too_long == "split" else 0,
            tokens=self._tokens,
            longest=self._longest,
            hits=len(self._hits),
            misses=len(self._misses),
            tokens_to_prefill=self._tokens_to_prefill,
            bytes_to_store=self._bytes_to_store,
            free_bytes=shutil.disk_usage(existing(self._job.cache.dir)).free,
            budget_bytes=_budget(self._job),
            estimated=self._estimated,
        )

    def _add_counted(self, document: _Document, label: int, lengths: Lengths) -> None:
        fitting = self._fitting(document, lengths)
        if self._is_to_be_cut(document, lengths):
            self._cut += 1
            lengths, fitting = self._cut_lengths(document, lengths), {query.id for query in document.queries}
        self._tokens += lengths.context
        self._longest = max(self._longest, lengths.context)
        self._estimated |= lengths.estimated
        self._too_long += len(fitting) < len(document.queries)
        if self._stored.holds(label, lengths.context, lengths.estimated):
            self._hits.add(label)
        elif label not in self._misses and fitting & document.pending:
            self._misses.add(label)
            self._tokens_to_prefill += lengths.context
            self._bytes_to_store += self._bytes(lengths.context)

    def _is_to_be_cut(self, document: _Document, lengths: Lengths) -> bool:
        return self._job.documents.too_long != "error" and 0 < self._room(document, lengths) < lengths.context

    def _cut_lengths(self, document: _Document, lengths: Lengths) -> Lengths:
        """The lengths of what is read of a document, all windows together, which can only be estimated."""
        room = self._room(document, lengths)
        if self._job.documents.too_long == "split":
            room = round(lengths.context * OVERLAP / (OVERLAP - 1))
        return replace(lengths, context=room, estimated=True)

    def _room(self, document: _Document, lengths: Lengths) -> int:
        """The tokens that a context may have; its own where there is no limit."""
        if self._limit is None:
            return lengths.context
        return self._limit - reserved(document.queries, self._job.generation) - min(lengths.suffixes)

    def _asked_of(self, document: _Document) -> Questions:
        """What is asked of a document; worked out once for documents that follow each other and share their queries."""
        if document.queries is not self._questions_of:
            longest = [query.settings(self._job.generation).max_tokens for query in document.queries]
            rooms = () if self._limit is None else tuple(self._limit - tokens for tokens in longest)
            self._questions = Questions(tuple(query.text for query in document.queries), rooms)
            self._questions_of = document.queries
        return self._questions

    def _fitting(self, document: _Document, lengths: Lengths) -> set[str]:
        """The queries for which the model reads far enough."""
        if self._limit is None:
            return {query.id for query in document.queries}
        each = zip(document.queries, lengths.suffixes, self._asked_of(document).rooms, strict=True)
        return {query.id for query, suffix, room in each if lengths.context + suffix <= room}


def _budget(job: Job) -> int | None:
    return None if job.cache.budget is None else budget_bytes(job.cache.budget, job.cache.dir)


@dataclass(frozen=True)
class _Document:
    """What is left of one document: ``rendered`` is None where that fails."""

    queries: Sequence[Query]
    rendered: Rendered | None
    pending: frozenset[str]
    failed: int


def _documents(job: Job, inputs: Inputs, identity: Identity) -> Iterator[_Document]:
    renderer, fitting = Renderer(job.prompt), WindowCutter(job)
    with Results(job.result_file, url=job.result_url, read_only=True) as results:
        for document in inputs.stream():
            every = frozenset(query.id for query in document.queries)
            rows = results.rows(document.id)
            failed = sum(row.status == "error" for query_id, row in rows.items() if query_id in every)
            try:
                rendered = renderer.render(document)
            except RowError:
                yield _Document(document.queries, None, every, failed)
                continue
            cut = fitting.mark(rendered, document.queries)
            fingerprints = row_fingerprints(identity, rendered, document.queries, job.generation, cut) if rows else {}
            kept = kept_rows(rows, fingerprints)
            yield _Document(document.queries, rendered, every - kept.keys(), failed)


def _batches(documents: Iterable[_Document]) -> Iterator[list[_Document]]:
    """Documents to be tokenised together: enough to keep a tokenizer's threads busy, few enough to be held."""
    batch: list[_Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.rendered.context) if document.rendered else 0
        if len(batch) >= _DOCUMENTS_PER_BATCH or characters >= _CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
