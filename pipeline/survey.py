"""What a run would do, and what has been done: ``plan`` and ``status``, without loading weights.

Reads what a run would read and changes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.documents import check_documents, stream_documents
from pipeline.errors import RowError
from pipeline.identity import cache_codec, job_identity, kept_rows, row_fingerprints
from pipeline.job import Job
from pipeline.model import load_tokenizer, max_context, read_config, resolve_model
from pipeline.prompts import PromptTokenizer, Rendered, Renderer, template_columns
from pipeline.results import Results
from turboquant.identity import Identity


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
    """What a run would cost. ``unreadable`` and ``too_long`` count documents of which some rows will fail; ``hits``
    counts the documents' prefixes that are in the store, ``misses`` those that a run would build.
    """

    status: Status
    unreadable: int
    too_long: int
    tokens: int
    longest: int
    hits: int
    misses: int
    tokens_to_prefill: int
    bytes_to_store: int
    free_bytes: int


def job_status(job: Job) -> Status:
    """Count a job's rows; a row answered under other settings, weights or text counts as left."""
    check_documents(job.documents, template_columns(job.prompt))
    documents = _documents(job, job_identity(job, remember=False))
    return _count(job, [(len(document.pending), document.failed) for document in documents])


def plan_job(job: Job) -> Plan:
    """Tokenise everything and look each prefix up in the store. Raises JobError for what is wrong."""
    from pipeline.store import Store

    check_documents(job.documents, template_columns(job.prompt))
    path = resolve_model(job.model)
    config, identity = read_config(path), job_identity(job, remember=False)
    tokenizer = load_tokenizer(path)
    prompts, store, limit = PromptTokenizer(tokenizer), Store(job.cache.dir), max_context(config, tokenizer)
    query_texts = [query.text for query in job.queries]
    left_and_failed: list[tuple[int, int]] = []
    lengths: list[int] = []
    stored: set[str] = set()
    missing: dict[str, int] = {}  # tokens by key: documents with the same text share a prefix
    unreadable = too_long = 0
    for document in _documents(job, identity):
        left_and_failed.append((len(document.pending), document.failed))
        try:
            tokens = prompts.tokenise(document.rendered, query_texts) if document.rendered else None
        except RowError:
            tokens = None
        if tokens is None:
            unreadable += 1
            continue
        lengths.append(len(tokens.context))
        fitting = {
            query.id
            for query, suffix in zip(job.queries, tokens.suffixes, strict=True)
            if limit is None or len(tokens.context) + len(suffix) + query.settings(job.generation).max_tokens <= limit
        }
        too_long += len(fitting) < len(job.queries)
        key = identity.key(tokens.context)
        if store.contains(key):
            stored.add(key)
        elif fitting & document.pending:
            missing[key] = len(tokens.context)
    return Plan(
        status=_count(job, left_and_failed),
        unreadable=unreadable,
        too_long=too_long,
        tokens=sum(lengths),
        longest=max(lengths, default=0),
        hits=len(stored),
        misses=len(missing),
        tokens_to_prefill=sum(missing.values()),
        bytes_to_store=sum(_prefix_bytes(job, config, length) for length in missing.values()),
        free_bytes=shutil.disk_usage(_existing(job.cache.dir)).free,
    )


@dataclass(frozen=True)
class _Document:
    """What is left of one document: ``rendered`` is None where that fails."""

    rendered: Rendered | None
    pending: frozenset[str]
    failed: int


def _documents(job: Job, identity: Identity) -> Iterator[_Document]:
    renderer = Renderer(job.prompt)
    with Results(job.output.path, read_only=True) as results:
        for document in stream_documents(job.documents, template_columns(job.prompt)):
            rows = results.rows(document.id)
            failed = sum(rows[query.id].status == "error" for query in job.queries if query.id in rows)
            try:
                rendered = renderer.render(document)
            except RowError:
                yield _Document(None, frozenset(query.id for query in job.queries), failed)
                continue
            fingerprints = row_fingerprints(identity, rendered, job)
            yield _Document(rendered, frozenset(fingerprints) - kept_rows(rows, fingerprints).keys(), failed)


def _count(job: Job, left_and_failed: Sequence[tuple[int, int]]) -> Status:
    rows = len(left_and_failed) * len(job.queries)
    left, failed = (sum(counts) for counts in zip(*left_and_failed, strict=True))
    return Status(len(left_and_failed), rows, rows - left, failed)


def _prefix_bytes(job: Job, config: dict[str, object], tokens: int) -> int:
    """About what a prefix takes on disk, were all layers of the model compressed."""
    text = config.get("text_config") or config
    assert isinstance(text, dict)
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or text["hidden_size"] // heads)
    return layers * kv_heads * cache_codec(job.cache).nbytes(tokens, head_dim)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return path if path.exists() else _existing(path.parent)
