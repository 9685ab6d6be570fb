"""The identity of a job's segments and the fingerprints of its rows: digests of everything that decides them.

A row's fingerprint covers the weights, the tokenizer and its chat template, the codec, the prefill mode, the
rendered prompt and the settings: change any and the row is answered again. It is taken from text, not tokens, so
that a finished job is recognised without loading a model.

`max_tokens` is compared apart (`is_within`): it decides only answers that it cuts off. Where a document may be read in
windows, it decides the answers on windows too, and is part of the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cache.codec import job_codec
from pipeline.errors import ModelError, PipelineError
from pipeline.inputs.prompts import Rendered, Renderer
from pipeline.inputs.questions import Question
from pipeline.job.job import Generation, Job, Query, Settings
from pipeline.job.shards import Shard
from pipeline.models.fingerprints import files_state, tokenizer_fingerprint, weights_fingerprint
from pipeline.models.loading import LoadedModel, check_layer_bits, load_model, model_folder
from pipeline.models.quotations import NEXT_QUESTION, QUESTION, SLOT_QUESTION
from pipeline.models.ranks import SINGLE, RankGroup
from pipeline.models.special_tokens import SpecialTokens
from pipeline.output.provenance import provenance
from turboquant.io.identity import Identity

if TYPE_CHECKING:
    from pipeline.output.rows import Row

MEMO = "fingerprints.json"
_MOST_LOADS = 3
_REMEDY = "nothing was stored that comes from it; leave the model's folder alone, and run the same command again"
_log = logging.getLogger(__name__)


def job_identity(job: Job, remember: bool = True, path: Path | None = None) -> Identity:
    """Return the identity of all segments of a job.

    Raises ModelError if the model is not found, or does not have the layers of `cache.layer_bits`.

    remember: write the digests of weight files to the cache folder, so that each file is hashed only once. path: the
    model's folder, if it is known.
    """
    path, codec = path or model_folder(job), job_codec(job.cache)
    check_layer_bits(codec, path)
    prefill: str = job.cache.prefill
    if job.cache.prefill == "streaming":
        prefill += f" {job.cache.segment}"
    if shared := Renderer(job.prompt, job.documents).shared:
        prefill += f" shared={_digest('shared', shared.system, shared.context)[:16]}"
    if job.scale.ranks > 1:  # several ranks add in another order, so they round differently
        prefill += f" ranks={job.scale.ranks}"
    return Identity(
        weights=weights_fingerprint(path, job.cache.dir / MEMO, remember, job.adapter, job.trust_remote_code),
        tokenizer=tokenizer_fingerprint(path),
        codec=codec.identity,
        prefill=prefill,
    )


def load_identified(job: Job, identity: Identity, ranks: RankGroup = SINGLE) -> LoadedModel:
    """Load a job's model from files that have the given identity, from the first byte that is read to the last.

    identity: as `job_identity` returned it when the run started. If the files change while they are read, they are read
    again. Raises PipelineError if they are not, or do not stay, what they were; ModelError as `load_model` does.
    """
    for _ in range(_MOST_LOADS):
        path = model_folder(job)
        adapter = None if job.adapter is None else job.adapter.resolve()
        before = files_state(path, adapter, job.trust_remote_code)
        now = asdict(job_identity(job, path=path))
        if changed := [name for name, value in asdict(identity).items() if now[name] != value]:
            what = " and ".join(changed)
            raise PipelineError(f"model {job.model}: its {what} changed since the run started; {_REMEDY}")
        try:
            loaded = load_model(path, None, adapter, job.trust_remote_code, ranks, job_codec(job.cache))
        except ModelError:  # perhaps because a file was replaced
            if files_state(path, adapter, job.trust_remote_code) == before:
                raise
        else:
            if files_state(path, adapter, job.trust_remote_code) == before:
                return loaded
        _log.warning("model %s: its files changed while they were read; they are read again", job.model)
    raise PipelineError(
        f"model {job.model}: its files changed each of the {_MOST_LOADS} times that they were read; {_REMEDY}"
    )


def result_metadata(
    job: Job, identity: Identity, queries: Sequence[Query], shard: Shard | None = None
) -> dict[str, str]:
    """Return the metadata of a result file: job, identity, what made it and, for a shard, which one it is.

    queries: those that all documents share. Values that are not text are JSON.
    """
    described = {"job": job.name, **asdict(identity), **provenance(job, queries)}
    described |= {"shard": str(shard)} if shard else {}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in described.items()}
    return {f"pipeline.{name}": text for name, text in texts.items()}


def context_label(rendered: Rendered) -> str:
    """Return a digest of a context's text alone, by which the store can explain why a segment is missing."""
    return _digest("context", rendered.system, rendered.context)


class RowFingerprints:
    """Makes the fingerprints of a document's rows: 32 hexadecimal digits each.

    cut: the result of WindowCutter.mark. special: the special tokens that are read as ordinary text in texts, or None
    if none are; a row whose texts have none has the same fingerprint in both cases. unseen: returns what decides a
    query's row and is in no text that the model reads. A fingerprint is the digest of a JSON list of everything that
    decides the answer. The beginning of the list is long and the same for all queries, so it is hashed only once.
    """

    def __init__(
        self,
        identity: Identity,
        rendered: Rendered,
        generation: Generation,
        cut: str | None = None,
        special: SpecialTokens | None = None,
        unseen: Callable[[Query], list[object]] = lambda _: [],
    ) -> None:
        shared = _json(["row", asdict(identity), rendered.system, rendered.context])
        self._beginning = hashlib.sha256(shared.removesuffix("]").encode())
        self._generation, self._cut, self._special, self._unseen = generation, cut, special, unseen
        self._has_special = special is not None and (
            special.are_in(rendered.system) or special.are_in(rendered.context)
        )

    def of(self, query: Query, question: Question, with_max_tokens: bool = False) -> str:
        """Return the fingerprint of a query's row. with_max_tokens: return the one that former releases wrote."""
        cut, special, settings = self._cut, self._special, query.settings(self._generation)
        deciding = settings.deciding
        # A choice has its own length, and each of several samples or of the answers that are refused may be cut off.
        is_plain = not settings.choices and settings.samples == 1 and query.check is None
        if cut is None and is_plain and not with_max_tokens:
            del deciding["max_tokens"]
        asked = [QUESTION, NEXT_QUESTION, SLOT_QUESTION] if settings.wants_evidence else []
        texts = [question.text, *(text for turn in question.turns for text in turn)]
        marked = self._has_special or (special is not None and any(map(special.are_in, texts)))
        as_text = ["special tokens: text"] if marked else []
        turns = [["turns", *question.turns]] if question.turns else []
        checks = [["check", query.check, query.retries]] if query.check else []
        cuts = [] if cut is None else [cut]
        own = _json([question.text, deciding, *cuts, *asked, *as_text, *turns, *checks, *self._unseen(query)])
        digest = self._beginning.copy()
        digest.update(f", {own.removeprefix('[')}".encode())
        return digest.hexdigest()[:32]


def skipped_fingerprint(condition: str) -> str:
    """Return the fingerprint of a row that is not answered because a condition does not hold."""
    return _digest("skipped", condition)[:32]


def is_within(row: Row, settings: Settings) -> bool:
    """Return whether a row's answer is the one that the model would give with the `max_tokens` of these settings.

    An answer that ended by itself is, if the limit leaves room for it; one that was cut off, only at the same limit.
    """
    if row.answer_tokens is None:  # it failed before there was an answer
        return True
    if row.is_cut:
        return row.answer_tokens == settings.max_tokens
    # The token that stops a model is not counted, but the end of a JSON answer and stop texts are.
    stop_token = not settings.stop and settings.json_schema is None
    return row.answer_tokens + stop_token <= settings.max_tokens


def _digest(kind: str, *fields: object) -> str:
    return hashlib.sha256(_json([kind, *fields]).encode()).hexdigest()


def _json(fields: list[object]) -> str:
    return json.dumps(fields, sort_keys=True, default=lambda value: f"{type(value).__name__} {value}")
