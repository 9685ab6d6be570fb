"""What decides a segment's content and a row's answer, as digests.

A row's fingerprint covers the weights, the tokenizer and its chat template, the codec, the prefill mode, the
rendered prompt and the settings: change any and the row is answered again. It is taken from text, not tokens, so
that a finished job is recognised without loading a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.inputs.prompts import Rendered, Renderer
from pipeline.job.job import Cache, Generation, Job, Query
from pipeline.job.shards import Shard
from pipeline.models.fingerprints import tokenizer_fingerprint, weights_fingerprint
from pipeline.models.loading import resolve_model
from turboquant.io.identity import Identity

if TYPE_CHECKING:
    from pipeline.output.rows import Row
    from turboquant.quant.cache_codec import CacheCodec

MEMO = "fingerprints.json"


def cache_codec(cache: Cache) -> CacheCodec:
    """The codec a job asks for."""
    from turboquant.quant.cache_codec import CacheCodec

    return CacheCodec(
        cache.key_bits,
        cache.value_bits,
        sinks=cache.sinks,
        window=cache.window,
        extra_bits=cache.extra_bits,
        layer_bits=tuple((layer, bits, bits) for layer, bits in cache.layer_bits.items()),
    )


def job_identity(job: Job, remember: bool = True) -> Identity:
    """The identity of all segments of a job. Raises ModelError where there is no such model.

    ``remember`` writes the weights' digests to the cache folder, so that they are hashed once.
    """
    path: Path = resolve_model(job.model, job.revision)
    prefill: str = job.cache.prefill
    if job.cache.prefill == "streaming":
        prefill += f" {job.cache.segment}"
    if shared := Renderer(job.prompt).shared:
        prefill += f" shared={_digest('shared', shared.system, shared.context)[:16]}"
    if job.scale.ranks > 1:  # which add up in another order than one does, so round otherwise
        prefill += f" ranks={job.scale.ranks}"
    return Identity(
        weights=weights_fingerprint(path, job.cache.dir / MEMO, remember, job.adapter, job.trust_remote_code),
        tokenizer=tokenizer_fingerprint(path),
        codec=cache_codec(job.cache).identity,
        prefill=prefill,
    )


def result_metadata(job: Job, identity: Identity, shard: Shard | None = None) -> dict[str, str]:
    """What a result file says of the job, or the shard of it, whose rows it holds."""
    described = {"job": job.name, **asdict(identity)} | ({"shard": str(shard)} if shard else {})
    return {f"pipeline.{name}": value for name, value in described.items()}


def context_label(rendered: Rendered) -> str:
    """Names a context by its text alone, so that a miss can say what else has changed."""
    return _digest("context", rendered.system, rendered.context)


def row_fingerprints(
    identity: Identity,
    rendered: Rendered,
    queries: Iterable[Query],
    generation: Generation,
    cut: str | None = None,
) -> dict[str, str]:
    """The fingerprints of a document's rows, by query id: each names everything that decides an answer, in 32 digits.

    cut: what WindowCutter.mark says. A fingerprint is the digest of one JSON list. What comes before the query is the
    same in all of them, and long.
    """
    shared = _json(["row", asdict(identity), rendered.system, rendered.context])
    beginning = hashlib.sha256(shared.removesuffix("]").encode())
    fingerprints: dict[str, str] = {}
    for query in queries:
        digest = beginning.copy()
        own = _json([query.text, vars(query.settings(generation)), *([] if cut is None else [cut])])
        digest.update(f", {own.removeprefix('[')}".encode())
        fingerprints[query.id] = digest.hexdigest()[:32]
    return fingerprints


def kept_rows(known: Mapping[str, Row], fingerprints: Mapping[str, str], keep_failed: bool = False) -> dict[str, Row]:
    """Those of a document's known rows that need no new answer, in the order of the fingerprints.

    Failed ones need one unless they are to be kept.
    """
    return {
        query_id: row
        for query_id, fingerprint in fingerprints.items()
        if (row := known.get(query_id)) and (keep_failed or row.status == "ok") and row.fingerprint == fingerprint
    }


def _digest(kind: str, *fields: object) -> str:
    return hashlib.sha256(_json([kind, *fields]).encode()).hexdigest()


def _json(fields: list[object]) -> str:
    return json.dumps(fields, sort_keys=True)
