"""Compare logits with those of full precision, and summarise the comparisons of many positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.runtime.device import array_module, as_float32

SCORED_AT_ONCE = 1 << 22  # how many logits are compared at a time, in float64, so that little memory is needed

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """For each position: divergence in nats, whether the most likely token is the same (0 or 1), and cosine.

    loss, loss_full: the losses of all tokens but the first, here and in full precision, in nats.
    """

    kl: Floats
    top1: Floats
    cosine: Floats
    loss: Floats
    loss_full: Floats


def score(full: mx.array, compressed: mx.array, tokens: Sequence[int]) -> Scores:
    """Compare the logits (L, vocabulary) behind L tokens, position by position."""
    rows = max(1, SCORED_AT_ONCE // full.shape[-1])
    following = [*tokens[1:], 0]  # no token is known to follow the last one, whose loss is dropped below
    parts = [
        _score_some(full[i : i + rows], compressed[i : i + rows], following[i : i + rows])
        for i in range(0, len(tokens), rows)
    ]
    kl, top1, cosine, loss, loss_full = (np.concatenate(values) for values in zip(*parts, strict=True))
    return Scores(kl, top1, cosine, loss[:-1], loss_full[:-1])


def perplexity(losses: Sequence[Floats]) -> float:
    """Return exp of the mean loss."""
    return math.exp(float(np.concatenate(losses).mean()))


def clustered_error(clusters: Sequence[Floats]) -> float | None:
    """Return the standard error of the mean over all positions, where positions of one cluster depend on each other.

    Returns None for fewer than two clusters.

    Source: Cochran, "Sampling Techniques" (1977), 2.11, the ratio estimator.
    """
    if len(clusters) < 2:
        return None
    mean = np.concatenate(clusters).mean()
    sums = np.array([(values - mean).sum() for values in clusters])
    count = len(clusters)
    return math.sqrt(count / (count - 1) * float(np.square(sums).sum())) / sum(values.size for values in clusters)


def _score_some(full: mx.array, compressed: mx.array, following: list[int]) -> tuple[Floats, ...]:
    """Return divergence, agreement, cosine and the two losses of each row.

    Let p be the prediction in full precision, and d the difference of the logits minus its mean under p. Then the
    divergence is log(sum(p exp(d))): equal logits give exactly 0, and small differences keep their digits in float32.
    On a CPU, NumPy computes it in float64, since MLX's exponentials are slow there.
    """
    xp = array_module()
    f, c = as_float32(xp, full), as_float32(xp, compressed)
    if xp is np:
        f, c = f.astype(np.float64), c.astype(np.float64)
    rows, after = xp.arange(len(following)), xp.array(following)
    shifted = f - f.max(axis=-1, keepdims=True)
    log_p = shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))
    p = xp.exp(log_p)
    difference = c - f
    difference = difference - (p * difference).sum(axis=-1, keepdims=True)
    kl = xp.log1p((xp.exp(log_p + difference) - p).sum(axis=-1))
    agree = f.argmax(axis=-1) == c.argmax(axis=-1)
    lengths = xp.sqrt((f * f).sum(axis=-1) * (c * c).sum(axis=-1))
    loss_full = -log_p[rows, after]
    loss = loss_full - difference[rows, after] + kl
    values = (kl, agree, (f * c).sum(axis=-1) / lengths, loss, loss_full)
    return tuple(np.asarray(x, dtype=np.float64) for x in values)
