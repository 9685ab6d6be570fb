"""Measure how much a compressed cache changes a model's predictions, compared with its full-precision cache.

Every continuation is fed as it is, whatever the model predicts (teacher forcing), and predictions are compared token by
token. The command line for this is fidelity.py.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant.caches.prefix import Prefix, Segment, join
from turboquant.eval.results import (
    Baseline,
    BatchDiffers,
    CannotRun,
    Fidelity,
    FidelityError,
    Filled,
    NoDrift,
    NotFinite,
    Sample,
    WarmDiffers,
)
from turboquant.eval.scores import Scores, clustered_error, perplexity, score
from turboquant.eval.teacher_forcing import Context, batch_logits, extend_by_answer, logits_of, prefill_context
from turboquant.io.identity import Identity
from turboquant.io.segment_file import read_segment, write_segment
from turboquant.mlx_lm.families import BATCHING_MESSAGES, explain, known_batching
from turboquant.mlx_lm.patch import enabled
from turboquant.quant.cache_codec import CacheCodec

# The smallest divergence that a cache in use causes is larger than this, in nats: another order of float32 additions
# causes 1e-11, and 8 bits cause 1e-5.
NO_DRIFT = 1e-9
BATCH_TOKENS = 64  # how many tokens of each row are compared between alone and in a batch


def measure(
    model: Any,
    samples: Sequence[Sample],
    baselines: Sequence[Baseline],
    *,
    answer_tokens: int = 0,
    stop: Collection[int] = (),
    chunk: int = 512,
    verify: bool = True,
    batched: bool = False,
    answers_only: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> list[Fidelity]:
    """Return the figures of each baseline, in their order, without those that cannot run this model.

    answer_tokens: each continuation is extended by at most this many tokens of the model's own greedy answer in full
        precision, up to the first token of ``stop``.
    chunk: how many tokens of a context are fed at a time.
    verify: also compare a prefix that was just built with the same one saved and loaded, where every logit must be the
        same, and rows alone with rows in a batch, where the first ``BATCH_TOKENS`` tokens of each row may differ by
        rounding: half of the digits of the logits' dtype. The figures are those of the loaded prefix.
    batched: feed continuations as one batch where a baseline's caches have ``merge``. Models whose rows are answered
        one by one (``families.known_batching``) get no batch, neither for this nor to verify.
    answers_only: count only the predictions of the answer's tokens, for a model that was never taught questions.
    on_step: called with a few words about each step, and with the reason where a baseline cannot run this model.

    The full-precision logits of one sample are held in memory: positions x vocabulary x 4 bytes. Raises NoDrift,
    NotFinite, WarmDiffers or BatchDiffers; CannotRun where no baseline can run this model; FidelityError where no layer
    of the model is compressible; ValueError where a sample is too short or there is nothing to measure.
    """
    support = explain(model)
    if support.status == "none":
        raise FidelityError(support.message)
    if not all(sample.context and all(len(run) > 1 for run in sample.continuations) for sample in samples):
        raise ValueError("a context needs a token, a continuation two")
    if not samples or not baselines:
        raise ValueError("at least one sample and one baseline are needed")
    if (verify or batched) and not _batches(model):
        on_step(f"rows are not compared with rows in a batch: {BATCHING_MESSAGES['one by one']}")
    outcomes: list[list[_Outcome]] = [[] for _ in baselines]
    left_out: list[str] = []
    with enabled(model):
        for number, sample in enumerate(samples, 1):
            context = prefill_context(model, sample.context, list(support.layers), chunk)
            followed = [extend_by_answer(context, run, answer_tokens, stop) for run in sample.continuations]
            full = [logits_of(model, copy.deepcopy(context.caches), run) for run in followed]
            on_step(f"sample {number} of {len(samples)}: {len(sample.context)} tokens in full precision")
            skipped = [len(run) - 1 if answers_only else 0 for run in sample.continuations]
            for baseline, found in zip(baselines, outcomes, strict=True):
                if len(found) < number - 1:
                    continue
                try:
                    found.append(_measure_one(context, baseline, followed, full, skipped, verify, batched))
                    on_step(f"sample {number} of {len(samples)}: {baseline}")
                except CannotRun as error:
                    left_out.append(str(error))
                    on_step(f"{baseline} is left out: {error}")
    if len(left_out) == len(baselines):
        raise CannotRun("; ".join(left_out))
    ran = [(one, found) for one, found in zip(baselines, outcomes, strict=True) if len(found) == len(samples)]
    return [_summarise(baseline, found) for baseline, found in ran]


# ---- one baseline on one sample


@dataclass(frozen=True)
class _Outcome:
    scores: list[Scores]
    nbytes: int
    coordinates: int
    tokens: int
    batch_difference: float | None


def _measure_one(
    context: Context,
    baseline: Baseline,
    runs: Sequence[Sequence[int]],
    full: Sequence[mx.array],
    skipped: Sequence[int],
    verify: bool,
    batched: bool,
) -> _Outcome:
    built = filled = baseline.fill(context)
    if isinstance(built.cache, Prefix) and baseline.codec is not None:
        filled = Filled(_saved_and_loaded(built.cache, baseline.codec), built.nbytes)
    found, difference = _run(context, filled, runs, batched), None
    if verify and isinstance(filled.cache, Prefix):
        for one, other in zip(_run(context, built, runs, batched), found, strict=True):
            if not bool(mx.array_equal(one, other)):
                raise WarmDiffers(f"{baseline}: saved and loaded, the cache gives other logits than just built")
        if _batches(context.model):
            difference = _difference_in_batch(context, baseline, filled, runs)
    scores = [
        score(one[first:], other[first:], run[first:])
        for one, other, run, first in zip(full, found, runs, skipped, strict=True)
    ]
    if not all(np.isfinite(values).all() for one in scores for values in vars(one).values()):
        raise NotFinite(f"{baseline}: the divergence from full precision is not finite")
    return _Outcome(scores, filled.nbytes, context.coordinates, len(context.tokens), difference)


def _saved_and_loaded(prefix: Prefix, codec: CacheCodec) -> Prefix:
    identity = Identity(weights="", tokenizer="", codec=codec.identity, prefill="exact")
    key = identity.key([])
    with tempfile.TemporaryDirectory() as folder:
        write_segment(Path(folder), key, Segment(prefix.layers, 0, prefix.tokens), identity)
        return join([read_segment(Path(folder), key, codec)])


def _run(context: Context, filled: Filled, runs: Sequence[Sequence[int]], batched: bool) -> list[mx.array]:
    """Return the logits of each run behind the cache, fed as one batch where ``batched``, model and cache allow it."""
    rows = [filled.fork() for _ in runs]
    if batched and _batches(context.model) and all(hasattr(cache, "merge") for cache in rows[0]):
        return batch_logits(context.model, rows, runs)
    return [logits_of(context.model, row, run) for row, run in zip(rows, runs, strict=True)]


def _batches(model: Any) -> bool:
    return known_batching(model) != "one by one"


def _difference_in_batch(context: Context, baseline: Baseline, filled: Filled, runs: Sequence[Sequence[int]]) -> float:
    """Return the largest difference of a logit between a row alone and in a batch.

    Raises BatchDiffers where rounding does not explain it.
    """
    runs = [run[:BATCH_TOKENS] for run in runs]
    if len(runs) == 1:  # add a second row of another length
        runs = [runs[0], runs[0][: len(runs[0]) // 2]]
    pairs = list(zip(*(_run(context, filled, runs, batched) for batched in (False, True)), strict=True))
    difference = max(float(mx.abs(alone - together).max()) for alone, together in pairs)
    allowed = math.sqrt(mx.finfo(pairs[0][0].dtype).eps) * max(float(mx.abs(alone).max()) for alone, _ in pairs)
    if not difference <= allowed:
        raise BatchDiffers(f"{baseline}: a logit differs by {difference:.3g} in a batch, by rounding {allowed:.3g}")
    return difference


# ---- figures


def _summarise(baseline: Baseline, outcomes: Sequence[_Outcome]) -> Fidelity:
    clusters = [[one] for one in outcomes[0].scores] if len(outcomes) == 1 else [x.scores for x in outcomes]
    every = [one for outcome in outcomes for one in outcome.scores]
    kl = np.concatenate([one.kl for one in every])
    nbytes, tokens = sum(x.nbytes for x in outcomes), sum(x.tokens for x in outcomes)
    effective = 8 * nbytes / sum(x.coordinates for x in outcomes)
    if min(baseline.key_bits, baseline.value_bits) < 16:
        if effective >= 16:
            raise NoDrift(f"{baseline}: the cache keeps so short a context in full precision")
        if kl.max() < NO_DRIFT:
            raise NoDrift(f"{baseline}: the cache moved not one prediction, so it was bypassed")
    differences = [x.batch_difference for x in outcomes if x.batch_difference is not None]
    return Fidelity(
        cache=baseline.name,
        prefill=baseline.prefill,
        key_bits=baseline.key_bits,
        value_bits=baseline.value_bits,
        effective_bits=effective,
        compression=16 / effective,
        bytes_per_token=nbytes / tokens,
        kl=float(kl.mean()),
        kl_stderr=clustered_error([np.concatenate([one.kl for one in cluster]) for cluster in clusters]),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_worst=float(kl.max()),
        top1=float(np.concatenate([one.top1 for one in every]).mean()),
        answers=float(np.mean([one.top1.all() for one in every])),
        cosine=float(np.concatenate([one.cosine for one in every]).mean()),
        perplexity=perplexity([one.loss for one in every]),
        perplexity_full=perplexity([one.loss_full for one in every]),
        positions=int(kl.size),
        batch_difference=max(differences, default=None),
    )
