"""Rounding in a metric has less error in it than the nearest levels, and is the same in NumPy and in MLX."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from turboquant import Codec
from turboquant.quant import rounding
from turboquant.quant.codebook import lloyd_max
from turboquant.quant.rounding import RoundingMetric

HEADS, TOKENS = 2, 40


def make_metric(dim: int) -> NDArray[np.float64]:
    """Return the second moment of queries that prefer some directions."""
    random = np.random.default_rng(0)
    factors = random.normal(size=(HEADS, dim, dim)) * np.exp(1.2 * random.normal(size=(HEADS, 1, dim)))
    return factors @ factors.swapaxes(1, 2)


def unit_vectors(dim: int) -> NDArray[np.float32]:
    unit = np.random.default_rng(1).normal(size=(HEADS, dim, TOKENS)).astype(np.float32)
    return unit * np.float32(np.sqrt(dim)) / np.linalg.norm(unit, axis=1, keepdims=True)


def error(unit: Any, codes: Any, factors: Any, metric: NDArray[np.float64], bits: int) -> float:
    difference = np.array(factors)[:, None] * lloyd_max(bits).levels[np.array(codes)] - unit
    return float(np.einsum("hit,hij,hjt->", difference, metric, difference))


@pytest.mark.parametrize(("bits", "share"), [(2, 0.5), (3, 0.4), (4, 0.4), (8, 0.4)])
@pytest.mark.parametrize("dim", [64, 80])
def test_errors_are_smaller_in_the_directions_of_the_queries(bits: int, share: float, dim: int) -> None:
    unit, metric = unit_vectors(dim), make_metric(dim)
    nearest = np.abs(unit[..., None] - lloyd_max(bits).levels).argmin(-1)
    norms = np.sqrt(dim) / np.linalg.norm(lloyd_max(bits).levels[nearest], axis=1)
    codes, factors = rounding.round_in_metric(np, unit, RoundingMetric.prepare(np, metric), bits)
    assert error(unit, codes, factors, metric, bits) < share * error(unit, nearest, norms, metric, bits)


def test_a_metric_without_directions_gives_about_the_nearest_levels() -> None:
    unit = unit_vectors(64)
    codes, _ = rounding.round_in_metric(np, unit, RoundingMetric.prepare(np, np.stack([np.eye(64)] * HEADS)), 4)
    nearest = np.abs(unit[..., None] - lloyd_max(4).levels).argmin(-1)
    assert (codes == nearest).mean() > 0.95


@pytest.mark.parametrize("metric", [np.zeros((HEADS, 64, 64)), np.ones((HEADS, 64, 64)) * 1e30])
def test_a_metric_of_zeros_or_of_rank_one_can_be_used(metric: NDArray[np.float64]) -> None:
    codes, factors = rounding.round_in_metric(np, unit_vectors(64), RoundingMetric.prepare(np, metric), 3)
    assert codes.max() < 8
    assert np.isfinite(factors).all()


def test_each_vector_is_rounded_alone() -> None:
    unit, metric = unit_vectors(64), make_metric(64)
    prepared = RoundingMetric.prepare(np, metric)
    codes, _ = rounding.round_in_metric(np, unit, prepared, 4)
    some, _ = rounding.round_in_metric(np, np.ascontiguousarray(unit[:, :, 7:20]), prepared, 4)
    assert (codes[:, :, 7:20] == some).mean() > 0.999


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mlx_rounds_as_numpy_does(bits: int) -> None:
    unit, metric = unit_vectors(64), make_metric(64)
    codes, factors = rounding.round_in_metric(np, unit, RoundingMetric.prepare(np, metric), bits)
    others, other_factors = rounding.round_in_metric(
        mx, mx.array(unit), RoundingMetric.prepare(mx, mx.array(metric)), bits
    )
    assert (np.array(others) == codes).mean() > 0.99  # sums are rounded differently, and a tie may end either way
    assert np.abs(np.array(other_factors) - factors).mean() < 1e-3


def test_the_codec_takes_the_metric_of_unrotated_keys() -> None:
    """The error in the direction of the queries must be much smaller than without a metric."""
    codec, x = Codec(64, 3), mx.random.normal((1, 500, 64))
    direction = np.zeros((1, 64, 64))
    direction[0, 5, 5] = 1.0
    aware = np.array(codec.decode(codec.encode(x, None, codec.rounding_metric(direction))) - x)[0]
    plain = np.array(codec.decode(codec.encode(x)) - x)[0]
    assert np.square(aware[:, 5]).mean() < 0.1 * np.square(plain[:, 5]).mean()
