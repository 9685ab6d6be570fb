"""Statistics of a context's own queries are the same in chunks and at once, and they make codes better."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant import CacheCodec
from turboquant.kernels.encoding import encode_layer
from turboquant.quant import query_stats
from turboquant.quant.query_stats import QueryCollector, QueryStatistics

HEADS, REPEATS, TOKENS, DIM = 2, 2, 900, 64


@pytest.fixture
def queries() -> mx.array:
    """Make queries (1, n_heads, T, head_dim) that prefer some directions."""
    return mx.random.normal((1, HEADS * REPEATS, TOKENS, DIM)) * mx.exp(1.2 * mx.random.normal((DIM,)))


@pytest.fixture
def keys() -> mx.array:
    return mx.random.normal((HEADS, TOKENS, DIM))


def collect(queries: mx.array, chunk: int) -> QueryStatistics:
    collector = QueryCollector(TOKENS)
    for start in range(0, TOKENS, chunk):
        collector.add(queries[:, :, start : start + chunk], HEADS, start, DIM**-0.5)
    statistics = collector.statistics()
    assert statistics is not None
    return statistics


@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_chunks_give_the_same_statistics_as_the_whole(queries: mx.array, chunk: int) -> None:
    whole, parts = collect(queries, TOKENS), collect(queries, chunk)
    assert whole.positions == parts.positions
    assert mx.array_equal(whole.sampled, parts.sampled)
    np.testing.assert_allclose(np.array(whole.moment), np.array(parts.moment), rtol=1e-3, atol=1e-2)
    assert mx.array_equal(whole.sampled[:, 3], queries[0, :, whole.positions[3]])


def test_samples_are_spread_over_the_context(queries: mx.array) -> None:
    positions = np.array(collect(queries, 512).positions)
    assert 256 <= len(positions) <= 512
    assert set(np.diff(positions)) == {3}


def test_queries_are_not_kept_in_memory() -> None:
    collector, before = QueryCollector(8 * 2048), mx.get_active_memory()
    for chunk in range(8):
        collector.add(mx.random.normal((1, 4, 2048, DIM)), HEADS, chunk * 2048, 1.0)
    assert collector.statistics() is not None
    mx.synchronize()
    assert mx.get_active_memory() - before < 4 * 2048 * DIM * 4  # an eighth of them


def test_without_queries_there_are_no_statistics() -> None:
    assert QueryCollector(100).statistics() is None


def test_the_token_that_queries_attend_to_gets_most(queries: mx.array, keys: mx.array) -> None:
    mean = queries[0].reshape(HEADS, -1, DIM).mean(axis=1)
    keys[:, 500] = 40 * mean / mx.linalg.norm(mean, axis=-1, keepdims=True)
    queries = queries + 3 * mx.repeat(mean, REPEATS, axis=0)[None, :, None]
    _, attention = collect(queries, 512).metric_and_attention(keys)
    assert attention.argmax(axis=1).tolist() == [500, 500]


def test_near_and_first_tokens_are_not_counted(queries: mx.array, keys: mx.array) -> None:
    _, attention = collect(queries, 512).metric_and_attention(keys)
    assert attention[:, : query_stats.SINKS].max() == 0
    assert attention[:, TOKENS - query_stats.NEAR + 1 :].max() == 0
    assert attention[:, query_stats.SINKS : TOKENS // 2].min() > 0


def test_scores_in_blocks_give_the_same(queries: mx.array, keys: mx.array, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = collect(queries, 512)
    metric, attention = statistics.metric_and_attention(keys)
    monkeypatch.setattr(query_stats, "SCORES", 10 * TOKENS)
    other_metric, other_attention = statistics.metric_and_attention(keys)
    np.testing.assert_allclose(attention, other_attention, rtol=1e-4)
    np.testing.assert_allclose(metric, other_metric, rtol=1e-3, atol=1e-6)


def test_mlx_and_numpy_give_the_same(queries: mx.array, keys: mx.array, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = collect(queries, 512)
    metric, attention = statistics.metric_and_attention(keys)
    monkeypatch.setattr(query_stats, "array_module", lambda: mx)
    other_metric, other_attention = statistics.metric_and_attention(keys)
    np.testing.assert_allclose(attention, other_attention, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(metric, other_metric, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scores_have_less_error_if_queries_are_known(queries: mx.array, keys: mx.array, bits: int) -> None:
    def score_error(codec: CacheCodec, known: Any) -> float:
        layer = encode_layer(keys, keys, codec, known)
        later = queries[0, :, -50:].reshape(HEADS, -1, DIM)
        differences = later @ (layer.decode()[0] - keys).swapaxes(1, 2)
        return float(mx.square(differences).mean())

    codec = CacheCodec(bits, bits, extra_bits=0)
    known = collect(queries, 512)
    assert score_error(codec, known) < 0.6 * score_error(codec, None)
    assert score_error(CacheCodec(bits, bits, extra_bits=0, query_aware=False), known) == score_error(codec, None)


def test_tokens_that_queries_attend_to_are_kept_finer_and_every_token_is_held_once(
    queries: mx.array, keys: mx.array
) -> None:
    known = collect(queries, 512)
    values = mx.broadcast_to(mx.arange(TOKENS)[None, :, None], keys.shape).astype(mx.float32)
    layer = encode_layer(keys, values, CacheCodec(8, 8, query_aware=False), known)
    assert layer.fine_keys.tokens == 0  # nothing is finer than 8 bits
    layer = encode_layer(keys, values, CacheCodec(4, 4), known)
    held = np.array(layer.decode()[1]).mean(axis=-1)
    assert np.abs(np.sort(held, axis=1) - np.arange(TOKENS)).max() < 90  # each value's mean is its token's number
    finer = held[:, -layer.fine_keys.tokens :].round().astype(int)
    _, attention = known.metric_and_attention(keys)
    for head in range(HEADS):
        usual = np.median(attention[head][16 : TOKENS - 150])
        middle = [token for token in finer[head] if 16 <= token < TOKENS - 150]
        assert np.median(attention[head][middle]) > 2 * usual
