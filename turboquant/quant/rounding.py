"""Choosing codes so that the error is small where queries look.

The nearest level for each coordinate makes the error e of a key small on average over all directions. Attention sees
it only along queries, as q.e, so the codes chosen here make e' S e small instead, S being the second moment of the
queries. What decodes them need not know. Knows arrays and a codebook; which queries, is attention's (query_stats.py).

One routine does two things, a coordinate at a time, all vectors at once. From no error at all, in the metric's
triangular factor, it is rounding with feedback: each coordinate makes up for the errors of those before it (the LDLQ of
Chee et al., "QuIP", arXiv 2307.13304; GPTQ's order of work). From codes that are there already, in the metric itself,
it is coordinate descent. At two bits feedback overloads the outer levels and the nearest ones are the better start.
Coordinates are worked on in blocks, as GPTQ does: what the errors of all others make of a block is one product, and
only what changes within the block is followed up one by one.

Written for NumPy and MLX alike: ``xp`` is either module, and all arrays are that module's. On a GPU it is the
reference for a kernel, kernels/encoding_gpu.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turboquant.quant.codebook import lloyd_max

SWEEPS = 2
BLOCK = 16  # coordinates
DAMPING = 0.08  # of the metric's mean diagonal, added to its diagonal: queries to come are not those of the context
BINS, REACH = 4096, 5.0  # coordinates are looked up in bins over -REACH .. REACH
FEWEST_FOR_FEEDBACK = 3  # bits


@dataclass(frozen=True)
class RoundingMetric:
    """A metric for H heads, made ready once for all the vectors to be rounded in it.

    factor: (H, dim, dim) float32; row i: what coordinate i makes up of each later coordinate's error.
    pull: (H, dim, dim) float32; row i: how the errors of the others move coordinate i.
    damped: (H, dim, dim) float32, the metric itself.
    """

    factor: Any
    pull: Any
    damped: Any

    @classmethod
    def of(cls, xp: Any, metric: Any, kernel: Callable[[Any], Any] | None = None) -> RoundingMetric:
        """From (H, dim, dim) of that module, symmetric and positive semidefinite; NumPy's had better be float64.

        kernel: makes the damped metric's factor in LAPACK's place.
        """
        metric = _damped(xp, metric)
        pull = metric / xp.diagonal(metric, axis1=1, axis2=2)[:, :, None] - xp.eye(metric.shape[1])
        factor = kernel(metric) if kernel else feedback(xp, metric)
        return cls(*(x.astype(xp.float32) for x in (factor, pull, metric)))

    def of_heads(self, some: slice) -> RoundingMetric:
        """That of some of the heads."""
        return RoundingMetric(self.factor[some], self.pull[some], self.damped[some])


def round_in_metric(xp: Any, unit: Any, metric: RoundingMetric, bits: int) -> tuple[Any, Any]:
    """Codes (H, dim, T) uint8, and a factor (H, T) for each vector's levels, that are close to ``unit`` in ``metric``.

    unit: (H, dim, T) float32, vectors of norm sqrt(dim), coordinate by coordinate.

    The factor makes the product with the queries right on average: it divides by what the levels keep of it.
    """
    levels, scaled = xp.array(lloyd_max(bits).levels), metric.damped @ unit
    if bits < FEWEST_FOR_FEEDBACK:
        codes = nearest(xp, unit, bits)
    else:
        one = xp.ones(unit.shape[::2], dtype=xp.float32)
        codes = _sweep(xp, unit, xp.zeros_like(unit), metric.factor, one, bits, -1)
    for _ in range(SWEEPS):
        chosen = levels[codes]
        fitted = (chosen * scaled).sum(axis=1) / (chosen * (metric.damped @ chosen)).sum(axis=1)
        fitted = xp.clip(fitted, 0.5, 2.0)
        error = fitted[:, None] * chosen - unit
        codes = _sweep(xp, unit, error, metric.pull, fitted, bits, 1)
    kept = (levels[codes] * scaled).sum(axis=1)
    whole = (unit * scaled).sum(axis=1)
    return codes, xp.clip(whole / xp.maximum(kept, 1e-9), 0.5, 2.0)


def _sweep(xp: Any, unit: Any, error: Any, pull: Any, scale: Any, bits: int, step: int) -> Any:
    """Choose coordinates one by one, each by what ``pull`` makes of the errors of all others; changes ``error``.

    step: 1 from the first coordinate on, -1 from the last.
    """
    blocks, dim, codes = range(0, unit.shape[1], BLOCK), unit.shape[1], []
    for start in blocks[::step]:
        block = slice(start, min(start + BLOCK, dim))
        wanted = unit[:, block] - pull[:, block] @ error
        own = pull[:, block, block]
        chosen, error[:, block] = _round_block(xp, wanted, unit[:, block], error[:, block], own, scale, bits, step)
        codes.append(chosen)
    return xp.concatenate(codes[::step], axis=1)


def _round_block(
    xp: Any, wanted: Any, unit: Any, error: Any, own: Any, scale: Any, bits: int, step: int
) -> tuple[Any, Any]:
    """Codes and errors (H, B, T) of a block of coordinates, chosen one by one, from the last if ``step`` is -1.

    wanted: (H, B, T), what each coordinate should be, the errors of all others being what they were. unit: (H, B, T),
    what it is. error: (H, B, T), what they were. own: (H, B, B), how much errors of the block move the others in it.
    scale: (H, T), of the levels.
    """
    levels, changes = xp.array(lloyd_max(bits).levels), xp.zeros_like(wanted)
    codes: list[Any] = [None] * wanted.shape[1]
    for i in range(wanted.shape[1])[::step]:
        now = wanted[:, i] - (own[:, i : i + 1] @ changes)[:, 0]
        codes[i] = nearest(xp, now / scale, bits)
        changes[:, i] = scale * levels[codes[i]] - unit[:, i] - error[:, i]
    return xp.stack(codes, axis=1), error + changes


def nearest(xp: Any, x: Any, bits: int) -> Any:
    """The codes of the levels that are nearest to x, but for bins that a boundary cuts."""
    bins = xp.clip(x * (BINS / (2 * REACH)) + BINS / 2, 0, BINS - 1)
    return xp.array(code_of_bin(bits))[bins.astype(xp.int32)]


@functools.cache
def code_of_bin(bits: int) -> NDArray[np.uint8]:
    """(BINS,) the code of the level nearest to the middle of each bin."""
    centres = (np.arange(BINS) + 0.5) * (2 * REACH / BINS) - REACH
    return np.searchsorted(lloyd_max(bits).boundaries, centres).astype(np.uint8)


def _damped(xp: Any, metric: Any) -> Any:
    dim = metric.shape[1]
    mean = xp.trace(metric, axis1=1, axis2=2)[:, None, None] / dim
    mean = xp.where(mean > 0, mean, 1.0)
    return metric / mean + DAMPING * xp.eye(dim)


def feedback(xp: Any, metric: Any) -> Any:
    """Row i: what coordinate i makes up of each later coordinate's error, (H, dim, dim) float32; by LAPACK in float64.

    metric: (H, dim, dim), symmetric and positive definite.
    """
    factor = np.linalg.cholesky(np.array(metric, np.float64))
    unit_lower = factor / np.diagonal(factor, axis1=1, axis2=2)[:, None]
    return xp.array((unit_lower.swapaxes(1, 2) - np.eye(metric.shape[1])).astype(np.float32))
