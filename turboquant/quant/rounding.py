"""Choose codes so that the error is small in the directions of the queries.

The nearest level for each coordinate makes the error e of a key small on average over all directions. Attention only
depends on the products q.e with the queries. The codes chosen here make e' S e small, where S is the second moment of
the queries. Decoding is the same for both. query_stats.py measures S.

``_sweep`` chooses coordinates one by one, for all vectors at once, and is used in two ways:

- Rounding with feedback starts without errors and uses the metric's triangular factor: each coordinate compensates for
  the errors of those before it. This is LDLQ (Chee et al., "QuIP", arXiv 2307.13304), in GPTQ's order of work.
- Coordinate descent starts with codes and uses the metric itself.

At two bits, feedback drives coordinates beyond the outer levels, and the nearest levels are the better start.
As in GPTQ, coordinates are processed in blocks: one matrix product gives the effect of all other errors on a block, and
only changes within the block are applied one by one.

The code runs on NumPy and MLX: ``xp`` is either module, and all arrays belong to it. It is also the reference for the
kernel in kernels/encoding_gpu.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turboquant.quant.codebook import lloyd_max
from turboquant.runtime.device import diagonals, identity_matrix, traces

SWEEPS = 2  # of coordinate descent
BLOCK = 16  # coordinates
DAMPING = 0.08  # share of the mean diagonal that is added to the diagonal, because later queries differ from these
BINS, REACH = 4096, 5.0  # coordinates are looked up in BINS bins over -REACH .. REACH
BINS_PER_UNIT = BINS / (2 * REACH)
FEWEST_FOR_FEEDBACK = 3  # bits


@dataclass(frozen=True)
class RoundingMetric:
    """A metric for H heads, prepared once for all vectors that are rounded in it.

    factor: (H, dim, dim) float32; row i: how much of each later coordinate's error coordinate i compensates for.
    pull: (H, dim, dim) float32; row i: how far the errors of the other coordinates move the best value of coordinate i.
    damped: (H, dim, dim) float32, the damped metric.
    """

    factor: Any
    pull: Any
    damped: Any

    @classmethod
    def prepare(cls, xp: Any, metric: Any, kernel: Callable[[Any], Any] | None = None) -> RoundingMetric:
        """Damp and factorise a metric (H, dim, dim), symmetric and positive semidefinite; in NumPy best as float64.

        kernel: computes what ``feedback`` does, on a GPU.
        """
        one = identity_matrix(xp, metric.shape[1])
        mean = traces(xp, metric)[:, None, None] / metric.shape[1]
        metric = metric / xp.where(mean > 0, mean, 1.0) + DAMPING * one
        pull = metric / diagonals(xp, metric)[:, :, None] - one
        factor = kernel(metric) if kernel else feedback(xp, metric)
        return cls(*(x.astype(xp.float32) for x in (factor, pull, metric)))

    def slice_heads(self, some: slice) -> RoundingMetric:
        """Return the metric of some of the heads."""
        return RoundingMetric(self.factor[some], self.pull[some], self.damped[some])


def round_in_metric(xp: Any, unit: Any, metric: RoundingMetric, bits: int) -> tuple[Any, Any]:
    """Choose codes, and a factor for each vector's levels, so that the error is small in ``metric``.

    unit: (H, dim, T) float32, vectors of norm sqrt(dim), coordinate by coordinate.
    Returns codes (H, dim, T) uint8 and factors (H, T). With its factor, a vector's product with the queries is right
    on average.
    """
    codes_of_bins = code_of_bin(bits)
    levels, scaled = xp.array(lloyd_max(bits).levels[codes_of_bins]), metric.damped @ unit
    if bits < FEWEST_FOR_FEEDBACK:
        bins = _bins(xp, unit * BINS_PER_UNIT + BINS / 2)
    else:
        one = xp.ones(unit.shape[::2], dtype=xp.float32)
        bins = _sweep(xp, unit, xp.zeros_like(unit), metric.factor, one, bits, -1)
    for _ in range(SWEEPS):
        chosen = _look_up(xp, levels, bins)
        best_scale = (chosen * scaled).sum(axis=1) / (chosen * (metric.damped @ chosen)).sum(axis=1)
        best_scale = xp.clip(best_scale, 0.5, 2.0)
        error = best_scale[:, None] * chosen - unit
        bins = _sweep(xp, unit, error, metric.pull, best_scale, bits, 1)
    product_of_levels = (_look_up(xp, levels, bins) * scaled).sum(axis=1)
    exact_product = (unit * scaled).sum(axis=1)
    codes = _look_up(xp, xp.array(codes_of_bins), bins)
    return codes, xp.clip(exact_product / xp.maximum(product_of_levels, 1e-9), 0.5, 2.0)


def _sweep(xp: Any, unit: Any, error: Any, pull: Any, scale: Any, bits: int, step: int) -> Any:
    """Choose the codes of coordinates one by one, each by how far ``pull`` and the errors of all others move it.

    unit: (H, dim, T). error: (H, dim, T), the errors before; they are replaced by those after. pull: (H, dim, dim).
    scale: (H, T), of each vector's levels. step: 1 to begin with the first coordinate, -1 with the last.
    Returns the bins (H, dim, T) of the codes.
    """
    levels = xp.array(lloyd_max(bits).levels[code_of_bin(bits)] * np.float32(BINS_PER_UNIT))
    widths, dim = (scale / BINS_PER_UNIT)[:, None], unit.shape[1]  # of bins
    found: list[Any] = [None] * dim
    for start in range(0, dim, BLOCK)[::step]:
        block = slice(start, min(start + BLOCK, dim))
        # From here on in bins, of which a bin's number is the whole part.
        target = (unit[:, block] - pull[:, block] @ error) / widths + BINS / 2
        within, before = pull[:, block, block], (unit[:, block] + error[:, block]) / widths
        changes = xp.zeros_like(target)  # of the block's errors
        for i in range(target.shape[1])[::step]:
            moved = target[:, i] - (within[:, i : i + 1] @ changes)[:, 0]
            found[start + i] = _bins(xp, moved)
            changes[:, i] = _look_up(xp, levels, found[start + i]) - before[:, i]
        error[:, block] += changes * widths
    return xp.stack(found, axis=1)


def _bins(xp: Any, places: Any) -> Any:
    """Return the bins, integers, of places (0 .. BINS) among them. In NumPy they may lie outside, see ``_look_up``."""
    return places.astype(np.intp) if xp is np else xp.clip(places, 0, BINS - 1).astype(xp.int32)


def _look_up(xp: Any, table: Any, bins: Any) -> Any:
    """Return the table's entry for each bin. In NumPy a bin outside the table gets its first or last entry.

    NumPy's ``take`` is faster than indexing.
    """
    return table.take(bins, mode="clip") if xp is np else table[bins]


@functools.cache
def code_of_bin(bits: int) -> NDArray[np.uint8]:
    """Return the code of the level that is nearest to the middle of each bin, (BINS,)."""
    centres = (np.arange(BINS) + 0.5) * (2 * REACH / BINS) - REACH
    return np.searchsorted(lloyd_max(bits).boundaries, centres).astype(np.uint8)


def feedback(xp: Any, metric: Any) -> Any:
    """Factorise a metric (H, dim, dim), symmetric and positive definite, for rounding with feedback.

    Returns ``RoundingMetric.factor``, (H, dim, dim) float32, computed by LAPACK in float64.
    """
    factor = np.linalg.cholesky(np.array(metric, np.float64))
    unit_lower = factor / np.diagonal(factor, axis1=1, axis2=2)[:, None]
    return xp.array((unit_lower.swapaxes(1, 2) - np.eye(metric.shape[1])).astype(np.float32))
