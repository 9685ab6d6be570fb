"""What a context's own queries tell: the same however it is fed, and better codes for it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant import CacheCodec
from turboquant.kernels.encoding import encode_layer
from turboquant.quant import query_stats as queries
from turboquant.quant.query_stats import QueryCollector, QueryStatistics

HEADS, REPEATS, TOKENS, DIM = 2, 2, 900, 64


@pytest.fixture
def asked() -> mx.array:
    """Queries (1, n_heads, T, head_dim) that prefer some directions."""
    return mx.random.normal((1, HEADS * REPEATS, TOKENS, DIM)) * mx.exp(1.2 * mx.random.normal((DIM,)))


@pytest.fixture
def keys() -> mx.array:
    return mx.random.normal((HEADS, TOKENS, DIM))


def collect(asked: mx.array, chunk: int) -> QueryStatistics:
    collector = QueryCollector(TOKENS)
    for start in range(0, TOKENS, chunk):
        collector.add(asked[:, :, start : start + chunk], HEADS, start, DIM**-0.5)
    collected = collector.statistics()
    assert collected is not None
    return collected


@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_the_same_is_collected_in_chunks_and_at_once(asked: mx.array, chunk: int) -> None:
    whole, parts = collect(asked, TOKENS), collect(asked, chunk)
    assert whole.positions == parts.positions
    assert mx.array_equal(whole.sampled, parts.sampled)
    np.testing.assert_allclose(np.array(whole.moment), np.array(parts.moment), rtol=1e-3, atol=1e-2)
    assert mx.array_equal(whole.sampled[:, 3], asked[0, :, whole.positions[3]])


def test_samples_are_spread_over_the_context(asked: mx.array) -> None:
    positions = np.array(collect(asked, 512).positions)
    assert 256 <= len(positions) <= 512
    assert set(np.diff(positions)) == {3}


def test_queries_are_not_kept() -> None:
    collector, before = QueryCollector(8 * 2048), mx.get_active_memory()
    for chunk in range(8):
        collector.add(mx.random.normal((1, 4, 2048, DIM)), HEADS, chunk * 2048, 1.0)
    assert collector.statistics() is not None
    mx.synchronize()
    assert mx.get_active_memory() - before < 4 * 2048 * DIM * 4  # an eighth of them


def test_nothing_asked_is_nothing_collected() -> None:
    assert QueryCollector(100).statistics() is None


def test_a_token_that_queries_look_at_is_noticed(asked: mx.array, keys: mx.array) -> None:
    mean = asked[0].reshape(HEADS, -1, DIM).mean(axis=1)
    keys[:, 500] = 40 * mean / mx.linalg.norm(mean, axis=-1, keepdims=True)
    asked = asked + 3 * mx.repeat(mean, REPEATS, axis=0)[None, :, None]
    _, looks = collect(asked, 512).metric_and_attention(keys)
    assert looks.argmax(axis=1).tolist() == [500, 500]


def test_near_and_first_tokens_don_t_count(asked: mx.array, keys: mx.array) -> None:
    _, looks = collect(asked, 512).metric_and_attention(keys)
    assert looks[:, : queries.SINKS].max() == 0
    assert looks[:, TOKENS - queries.NEAR + 1 :].max() == 0
    assert looks[:, queries.SINKS : TOKENS // 2].min() > 0


def test_scores_in_blocks_are_the_same(asked: mx.array, keys: mx.array, monkeypatch: pytest.MonkeyPatch) -> None:
    collected = collect(asked, 512)
    metric, looks = collected.metric_and_attention(keys)
    monkeypatch.setattr(queries, "SCORES", 10 * TOKENS)
    other_metric, other_looks = collected.metric_and_attention(keys)
    np.testing.assert_allclose(looks, other_looks, rtol=1e-4)
    np.testing.assert_allclose(metric, other_metric, rtol=1e-3, atol=1e-6)


def test_mlx_and_numpy_see_the_same(asked: mx.array, keys: mx.array, monkeypatch: pytest.MonkeyPatch) -> None:
    collected = collect(asked, 512)
    metric, looks = collected.metric_and_attention(keys)
    monkeypatch.setattr(queries, "array_module", lambda: mx)
    other_metric, other_looks = collected.metric_and_attention(keys)
    np.testing.assert_allclose(looks, other_looks, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(metric, other_metric, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scores_are_closer_when_queries_are_known(asked: mx.array, keys: mx.array, bits: int) -> None:
    def off(codec: CacheCodec, known: Any) -> float:
        layer = encode_layer(keys, keys, codec, known)
        later = asked[0, :, -50:].reshape(HEADS, -1, DIM)
        shifts = later @ (layer.decode()[0] - keys).swapaxes(1, 2)
        return float(mx.square(shifts).mean())

    codec = CacheCodec(bits, bits, extra_bits=0)
    known = collect(asked, 512)
    assert off(codec, known) < 0.6 * off(codec, None)
    assert off(CacheCodec(bits, bits, extra_bits=0, query_aware=False), known) == off(codec, None)


def test_tokens_looked_at_are_kept_finer_and_every_token_is_held_once(asked: mx.array, keys: mx.array) -> None:
    known = collect(asked, 512)
    values = mx.broadcast_to(mx.arange(TOKENS)[None, :, None], keys.shape).astype(mx.float32)
    layer = encode_layer(keys, values, CacheCodec(8, 8, query_aware=False), known)
    assert layer.fine_keys.tokens == 0  # there is nothing finer than 8 bits
    layer = encode_layer(keys, values, CacheCodec(4, 4), known)
    held = np.array(layer.decode()[1]).mean(axis=-1)
    assert np.abs(np.sort(held, axis=1) - np.arange(TOKENS)).max() < 90  # each value's mean is its token's number
    finer = held[:, -layer.fine_keys.tokens :].round().astype(int)
    _, looks = known.metric_and_attention(keys)
    for head in range(HEADS):
        unseen = np.median(looks[head][16 : TOKENS - 150])
        middle = [token for token in finer[head] if 16 <= token < TOKENS - 150]
        assert np.median(looks[head][middle]) > 2 * unseen
