"""benches/papers.py: each method loses less with more bits, counts all bits, and does what its paper is about."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benches import papers
from benches.papers import Affine, BlockGtq, Calibration, KVarN, Method, Oscar, Window
from turboquant.eval.divergence import measure
from turboquant.eval.results import Sample
from turboquant.quant.codebook import lloyd_max

HEADS, TOKENS, DIM = 2, 256, 64
METHODS = ("affine", "oscar", "kvarn", "block_gtq")


def numbers(*shape: int, seed: int = 3) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def uneven_keys() -> mx.array:
    """Keys whose rotary pairs differ in energy, with one large channel and a few long tokens."""
    energy = np.tile(np.exp(-np.arange(DIM // 2) / 8), 2)
    energy[5] = 8
    length = np.where(np.arange(TOKENS) % 50 == 7, 6.0, 1.0)[:, None]
    return numbers(HEADS, TOKENS, DIM) * mx.array((energy * length).astype(np.float32))


def calibration() -> Calibration:
    """One layer's, in which queries look mostly along few directions."""
    keys, values = uneven_keys(), numbers(HEADS, TOKENS, DIM, seed=4)
    looks = np.random.default_rng(5).normal(size=(HEADS, DIM, DIM)) * np.exp(-np.arange(DIM) / 10)[:, None]
    flat = np.array(values.reshape(-1, DIM), np.float64)
    samples = keys.reshape(-1, DIM), values.reshape(-1, DIM), mx.ones(HEADS * TOKENS)
    energy = np.array(mx.square(keys).mean(axis=1), np.float64)
    return Calibration(looks.swapaxes(1, 2) @ looks, energy, flat.T @ flat / len(flat), *samples)


def method_of(name: str, bits: int) -> Any:
    if name == "oscar":
        return Oscar.calibrated(bits, bits, [calibration()])
    if name == "block_gtq":
        return BlockGtq.calibrated(bits, bits, [calibration()])
    return KVarN(bits, bits) if name == "kvarn" else Affine(bits, bits)


def errors(method: Method) -> list[float]:
    given = uneven_keys(), numbers(HEADS, TOKENS, DIM, seed=4)
    found = method.code(0, *given)[:2]
    return [float(mx.square(x - y).mean() / mx.square(x).mean()) for x, y in zip(given, found, strict=True)]


@pytest.mark.parametrize("name", METHODS)
def test_the_error_falls_by_three_fifths_with_each_bit(name: str) -> None:
    for more, fewer in itertools.pairwise([errors(method_of(name, bits)) for bits in (4, 3, 2)]):
        assert all(2.5 * one < other for one, other in zip(more, fewer, strict=True))


@pytest.mark.parametrize(
    ("name", "of_keys", "of_values"),
    [  # bits of a coordinate besides its code, for 2 bits, heads of 64 and tiles of 128
        ("affine", 32 / 64, 32 / 64),
        ("oscar", 32 / 64, 32 / 64),
        ("kvarn", 32 / 128 + 16 / 64, 32 / 64 + 16 / 128),
        ("block_gtq", None, 16 / 64),
    ],
)
def test_all_bits_are_counted(name: str, of_keys: float | None, of_values: float) -> None:
    method = method_of(name, 2)
    if of_keys is None:
        of_keys = sum(16 * len(set(pairs.tolist())) / 64 for pairs in method.layers[0]) / HEADS
        assert of_keys > 16 / 64
    bits = method.code(0, uneven_keys(), numbers(HEADS, TOKENS, DIM))[2]
    assert bits == (2 + of_keys + 2 + of_values) * HEADS * TOKENS * DIM


def test_tokens_of_the_window_and_those_that_fill_no_tile_are_kept_and_counted(
    build_model: Callable[[str], Any], random_tokens: Callable[[int, int], list[int]]
) -> None:
    samples = [Sample(tuple(random_tokens(300, 1)), (tuple(random_tokens(20, 9)),))]
    methods = [Affine(4, 4, Window(10, 30)), KVarN(4, 4, Window(20, 0)), KVarN(2, 2, Window(20, 0))]
    affine, kvarn, fewer = measure(build_model("llama"), samples, [papers.emulated(one) for one in methods])
    assert affine.effective_bits == pytest.approx((16 * 40 + (4 + 32 / 64) * 260) / 300)
    scales = (32 / 128 + 16 / 64 + 32 / 64 + 16 / 128) / 2
    assert kvarn.effective_bits == pytest.approx((16 * 44 + (4 + scales) * 256) / 300)
    assert affine.kl < fewer.kl
    assert kvarn.kl < fewer.kl


def test_oscar_rotates_so_that_queries_look_evenly_along_all_coordinates() -> None:
    one = calibration()
    rotation = np.array(method_of("oscar", 2).layers[0][0], np.float64)
    covariance = one.queries.mean(axis=0)
    assert rotation @ rotation.T == pytest.approx(np.eye(DIM), abs=1e-5)
    along = np.diagonal(rotation.T @ covariance @ rotation)
    assert along == pytest.approx(np.trace(covariance) / DIM, rel=1e-4)
    assert np.diagonal(covariance).std() > 0.05 * along.mean()  # they do not before


def test_oscar_clips_more_at_fewer_bits() -> None:
    four, two = (method_of("oscar", bits).clips for bits in (4, 2))
    assert max(two) < min(four)


def test_kvarn_makes_tokens_and_channels_even_where_none_is_much_longer() -> None:
    tiles = uneven_keys().reshape(HEADS, 2, 128, DIM)
    of_tokens, of_channels = papers.even_scales(tiles, 16)
    even = np.array(tiles / of_tokens / of_channels)
    assert even.std(axis=-1, ddof=1) == pytest.approx(1, rel=1e-2)
    assert even.std(axis=-2, ddof=1) == pytest.approx(1, rel=1e-2)
    without = errors(replace(KVarN(2, 2), rounds=0))
    assert errors(KVarN(2, 2))[0] < 0.8 * without[0]  # a long token no longer coarsens the codes of the others


def test_block_gtq_allocates_bits_as_well_as_any_other_way() -> None:
    scores = np.array([9.0, 0.3, 2.0, 0.01, 1.0])
    bits = papers.allocated(scores, 2.6, most=5)
    ways = [way for way in itertools.product(range(1, 6), repeat=5) if sum(way) == 13]
    assert bits.sum() == 13
    assert (scores / 4.0**bits).sum() == pytest.approx(min((scores / 4.0 ** np.array(way)).sum() for way in ways))


def test_block_gtq_loses_less_of_the_product_with_queries_than_equal_bits_do() -> None:
    keys, one = uneven_keys(), calibration()
    uneven = replace(one, queries=np.stack([np.diag(np.diagonal(x)) for x in one.queries * one.key_energy[:, None]]))
    more = BlockGtq.calibrated(2, 2, [uneven])
    equal = replace(more, layers=[[np.full(DIM // 2, 2)] * HEADS])
    looks = mx.array(uneven.queries.astype(np.float32))
    lost = []
    for method in (more, equal):
        off = method.code(0, keys, keys)[0] - keys
        lost.append(float(((off @ looks) * off).sum()))
    assert lost[0] < 0.5 * lost[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_levels_are_those_of_lloyd_max(bits: int) -> None:
    assert papers.lloyds_levels(bits) == pytest.approx(lloyd_max(bits).levels, abs=3e-3)


def test_a_layer_is_calibrated_on_the_queries_and_keys_of_its_contexts(
    build_model: Callable[[str], Any], random_tokens: Callable[[int, int], list[int]]
) -> None:
    model = build_model("llama")
    samples = [Sample(tuple(random_tokens(200, seed)), (tuple(random_tokens(20, 9)),)) for seed in (1, 2)]
    alone = [papers.calibrate(model, [sample]) for sample in samples]
    both = papers.calibrate(model, samples)
    assert len(both) == 2
    for layer, (one, other) in zip(both, zip(*alone, strict=True), strict=True):
        assert layer.queries == pytest.approx((one.queries + other.queries) / 2)
        assert layer.weighted_values == pytest.approx((one.weighted_values + other.weighted_values) / 2)
        assert layer.sampled_keys.shape == (2 * 2 * 184, 64)
        assert float(layer.weights.mean()) == pytest.approx(1, rel=1e-4)
        energy = np.array(mx.square(layer.sampled_keys).sum(axis=-1).mean())
        assert layer.key_energy.sum(axis=1).mean() == pytest.approx(energy, rel=1e-4)


def test_the_table_has_each_method_at_all_bits(
    build_model: Callable[[str], Any], random_tokens: Callable[[int, int], list[int]]
) -> None:
    model = build_model("llama")
    samples = [Sample(tuple(random_tokens(450, seed)), (tuple(random_tokens(20, 9)),)) for seed in (1, 2)]
    found = measure(model, samples[:1], papers.rows(papers.calibrate(model, samples[1:]), ["scalar"]))
    names = {(row.cache, row.key_bits, row.value_bits) for row in found}
    assert len(names) == len(found) == 25
    for name in ("turboquant", "OSCAR", "KVarN", "Block-GTQ"):
        four, two = (next(row for row in found if row.cache == name and row.key_bits == bits) for bits in (4, 2))
        assert four.kl < two.kl
