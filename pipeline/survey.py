"""What a run would do, and what has been done: ``plan`` and ``status``, without loading weights.

Reads what a run would read and changes nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.documents import check_documents, stream_documents
from pipeline.errors import RowError
from pipeline.identity import cache_codec, job_identity, row_fingerprint
from pipeline.job import Job
from pipeline.model import load_tokenizer, max_context, read_config, resolve_model
from pipeline.prompts import PromptTokenizer, Renderer, template_columns
from pipeline.results import Results


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
    """What a run would cost."""

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
    columns = template_columns(job.prompt)
    summary = check_documents(job.documents, columns)
    identity, renderer = job_identity(job), Renderer(job.prompt)
    done = failed = 0
    with Results(job.output.path, read_only=True) as results:
        for document in stream_documents(job.documents, columns):
            rows = results.rows(document.id)
            failed += sum(rows[query.id].status == "error" for query in job.queries if query.id in rows)
            try:
                rendered = renderer.render(document)
            except RowError:
                continue
            for query in job.queries:
                row = rows.get(query.id)
                fingerprint = row_fingerprint(identity, rendered, query.text, query.settings(job.generation))
                done += row is not None and row.status == "ok" and row.fingerprint == fingerprint
    return Status(summary.count, summary.count * len(job.queries), done, failed)


def plan_job(job: Job) -> Plan:
    """Tokenise everything and look each prefix up in the store. Raises JobError for what is wrong."""
    from pipeline.store import Store

    status = job_status(job)
    path = resolve_model(job.model)
    config, identity = read_config(path), job_identity(job)
    tokenizer = load_tokenizer(path)
    prompts, renderer, store = PromptTokenizer(tokenizer), Renderer(job.prompt), Store(job.cache.dir)
    limit = max_context(config, tokenizer)
    lengths: dict[bool, list[int]] = {True: [], False: []}
    unreadable = too_long = 0
    for document in stream_documents(job.documents, template_columns(job.prompt)):
        try:
            tokens = prompts.tokenise(renderer.render(document), [query.text for query in job.queries])
        except RowError:
            unreadable += 1
            continue
        room = min(
            len(suffix) + query.settings(job.generation).max_tokens
            for query, suffix in zip(job.queries, tokens.suffixes, strict=True)
        )
        if limit is not None and len(tokens.context) + room > limit:
            too_long += 1
            continue
        lengths[store.contains(identity.key(tokens.context))].append(len(tokens.context))
    every = lengths[True] + lengths[False]
    return Plan(
        status=status,
        unreadable=unreadable,
        too_long=too_long,
        tokens=sum(every),
        longest=max(every, default=0),
        hits=len(lengths[True]),
        misses=len(lengths[False]),
        tokens_to_prefill=sum(lengths[False]),
        bytes_to_store=sum(_prefix_bytes(job, config, length) for length in lengths[False]),
        free_bytes=shutil.disk_usage(_existing(job.cache.dir)).free,
    )


def _prefix_bytes(job: Job, config: dict[str, object], tokens: int) -> int:
    """About what a prefix takes on disk, were all layers of the model compressed."""
    text = config.get("text_config") or config
    assert isinstance(text, dict)
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or text["hidden_size"] // heads)
    codec = cache_codec(job.cache)
    kept = min(tokens, codec.sinks + codec.window_for(tokens))
    bits = codec.keys(head_dim).effective_bits + codec.values(head_dim).effective_bits
    per_head = (tokens - kept) * bits / 8 * head_dim + 2 * head_dim * (2 * kept + 4)
    return int(layers * kv_heads * per_head)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return path if path.exists() else _existing(path.parent)
