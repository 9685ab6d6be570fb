"""Attention on both implementations, MLX's operations and NumPy's, against float64 over the decoded K/V."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant import CacheCodec, EncodedLayer
from turboquant.attention import cpu, reference
from turboquant.attention import gpu as attention_gpu
from turboquant.attention.dispatch import attend_past, backend, has_kernel
from turboquant.attention.reference import Partial, add_sink_logits, fold_queries, merge, unfold_part
from turboquant.kernels.encoding import encode_layer
from turboquant.quant import SUPPORTED_BITS
from turboquant.quant.codec import Encoded
from turboquant.quant.packing import pack
from turboquant.quant.query_stats import QueryCollector

SCALE = 0.125
both = pytest.mark.parametrize("module", [reference, cpu], ids=["mlx", "numpy"])


def assert_close(part: Partial, expected: tuple[Any, Any], tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(np.array(part.output), expected[0], atol=tolerance)
    np.testing.assert_allclose(np.array(part.logsumexp), expected[1], atol=tolerance)


@both
@pytest.mark.parametrize("bits", [*itertools.product((2, 3, 4), repeat=2), (5, 6), (6, 8), (8, 5)])
def test_attention_to_a_layer_equals_attention_to_the_decoded_layer(
    module: ModuleType, bits: tuple[int, int], random_layer: Callable[..., EncodedLayer], exact_attention: Any
) -> None:
    layer = random_layer(300, CacheCodec(*bits))
    queries = mx.random.normal((1, 4, 3, 64)) * 2
    keys, values = layer.decode()
    expected = exact_attention(queries, keys[None], values[None], SCALE)
    assert_close(module.attend_layer(queries, layer, SCALE), expected)


@both
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (192, 128), (64, 96), (33, 17)]
)
@pytest.mark.parametrize(("heads", "n_kv_heads"), [(2, 2), (4, 2), (6, 1)])
def test_all_head_dims_and_grouped_queries_are_supported(
    module: ModuleType,
    key_dim: int,
    value_dim: int,
    heads: int,
    n_kv_heads: int,
    random_layer: Callable[..., EncodedLayer],
    exact_attention: Any,
) -> None:
    layer = random_layer(200, CacheCodec(3, 5), heads=n_kv_heads, key_dim=key_dim, value_dim=value_dim)
    queries = mx.random.normal((2, heads, 2, key_dim))
    keys, values = layer.decode()
    assert_close(module.attend_layer(queries, layer, SCALE), exact_attention(queries, keys[None], values[None], SCALE))


@both
@pytest.mark.parametrize("tokens", [1, 4, 5, 64, 65, 128, 129, 1000])
@pytest.mark.parametrize("codec", [CacheCodec(), CacheCodec(sinks=0, window=0)])
def test_the_number_of_tokens_and_tiles_does_not_matter(
    module: ModuleType,
    tokens: int,
    codec: CacheCodec,
    monkeypatch: pytest.MonkeyPatch,
    random_layer: Callable[..., EncodedLayer],
    exact_attention: Any,
) -> None:
    monkeypatch.setattr(reference, "TILE", 64)
    monkeypatch.setattr(reference, "SCORES", 64)
    monkeypatch.setattr(cpu, "BLOCK", 64)
    layer = random_layer(tokens, codec)
    queries = mx.random.normal((3, 4, 2, 64))
    keys, values = layer.decode()
    expected = exact_attention(queries, keys[None], values[None], SCALE)
    assert_close(module.attend_layer(queries, layer, SCALE), expected)
    monkeypatch.setattr("turboquant.attention.dispatch.backend", lambda: module)
    assert_close(attend_past(queries, layer.dense(mx.float32), SCALE), expected)


@both
def test_large_scores_neither_overflow_nor_lose_the_largest(
    module: ModuleType, random_layer: Callable[..., EncodedLayer], exact_attention: Any
) -> None:
    layer = random_layer(500, CacheCodec())
    queries = mx.random.normal((1, 4, 2, 64)) * 300
    keys, values = layer.decode()
    output, _ = exact_attention(queries, keys[None], values[None], 1.0)
    np.testing.assert_allclose(np.array(module.attend_layer(queries, layer, 1.0).output), output, atol=2e-2)


@both
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_queries_can_have_half_precision(
    module: ModuleType, dtype: mx.Dtype, random_layer: Callable[..., EncodedLayer], exact_attention: Any
) -> None:
    layer = random_layer(200, CacheCodec())
    queries = mx.random.normal((1, 4, 2, 64)).astype(dtype)
    keys, values = layer.decode()
    assert_close(module.attend_layer(queries, layer, SCALE), exact_attention(queries, keys[None], values[None], SCALE))


@both
@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 3),
    repeats=st.integers(1, 3),
    n_kv_heads=st.integers(1, 3),
    length=st.integers(1, 9),
    past=st.integers(0, 200),
    mask=st.sampled_from([None, "causal", "random", "two axes"]),
    block=st.sampled_from([64, 1000, 1 << 18]),
    seed=st.integers(0, 1000),
)
def test_dense_attention_is_right_under_every_kind_of_mask(
    module: ModuleType,
    batch: int,
    repeats: int,
    n_kv_heads: int,
    length: int,
    past: int,
    mask: str | None,
    block: int,
    seed: int,
    exact_attention: Any,
) -> None:
    tokens = past + length
    keys = [mx.random.key(seed + i) for i in range(3)]
    queries = mx.random.normal((batch, n_kv_heads * repeats, length, 16), key=keys[0])
    k = mx.random.normal((batch, n_kv_heads, tokens, 16), key=keys[1])
    v = mx.random.normal((batch, n_kv_heads, tokens, 24), key=keys[2])
    visible: Any = None
    given_mask: Any = mask
    if mask == "causal":
        visible = np.arange(tokens) <= np.arange(past, tokens)[:, None]
    elif mask == "random":  # in some rows nothing is visible
        visible = np.random.default_rng(seed).random((batch if seed % 2 else 1, 1, length, tokens)) < seed % 3 / 2
        given_mask = mx.array(visible)
    elif mask == "two axes":
        visible = np.random.default_rng(seed).random((length, tokens)) < 0.5
        given_mask = mx.array(visible)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK", block)
        part = module.attend_dense(queries, k, v, 0.25, given_mask)
    expected = exact_attention(queries, k, v, 0.25, visible)
    assert_close(part, expected)


def test_a_causal_mask_can_span_tiles(monkeypatch: pytest.MonkeyPatch, exact_attention: Any) -> None:
    """Some tiles are visible to all queries, one to some of them, and of the last one the first queries see nothing."""
    monkeypatch.setattr(reference, "TILE", 16)
    monkeypatch.setattr(reference, "SCORES", 16)
    queries, k, v = (mx.random.normal((2, heads, length, 16)) for heads, length in ((4, 40), (2, 90), (2, 90)))
    visible = np.arange(90) <= np.arange(50, 90)[:, None]
    assert_close(reference.attend_dense(queries, k, v, 0.25, "causal"), exact_attention(queries, k, v, 0.25, visible))


@pytest.mark.parametrize("small", [0, 1_000_000])
@pytest.mark.parametrize(
    ("size", "mean", "is_bounded"), [(1.0, 0.0, True), (1.0, 30.0, True), (40.0, 0.0, False), (1e30, 0.0, False)]
)
def test_many_queries_may_need_no_highest_score(
    small: int, size: float, mean: float, is_bounded: bool, monkeypatch: pytest.MonkeyPatch, exact_attention: Any
) -> None:
    """Their scores are bounded by the norms of queries and keys; a mean of all keys changes nothing."""
    monkeypatch.setattr(cpu, "SMALL", small)
    monkeypatch.setattr(cpu, "multiplies_uncopied", lambda: True)
    found = []
    monkeypatch.setattr(cpu.OnlineSoftmax, "centre", spied(cpu.OnlineSoftmax.centre, found))
    queries, k, v = (mx.random.normal((1, heads, n, 64)) for heads, n in ((6, 300), (2, 1400), (2, 1400)))
    queries, k = queries * size, k + mean * mx.random.normal((1, 2, 1, 64))
    visible = np.arange(1400) <= np.arange(1100, 1400)[:, None]
    part = cpu.attend_dense(queries, k, v, SCALE, "causal")
    expected = exact_attention(queries, k, v, SCALE, visible)
    np.testing.assert_allclose(np.array(part.output), expected[0], atol=1e-4 * max(1, size))
    np.testing.assert_allclose(np.array(part.logsumexp), expected[1], rtol=1e-5, atol=1e-4)
    assert [keys is not None for keys in found] == [is_bounded] * 2


def spied(function: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    """Return a function that does the same and keeps its results."""

    def call(*arguments: Any) -> Any:
        results.append(function(*arguments))
        return results[-1]

    return call


@both
@pytest.mark.parametrize("block", [64, 1 << 18])
def test_rows_that_see_nothing_have_no_weight_in_a_merge(
    module: ModuleType, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BLOCK", block)
    queries, kv = mx.random.normal((2, 2, 3, 16)), mx.random.normal((2, 2, 200, 16))
    mask = mx.zeros((2, 1, 3, 200), mx.bool_)
    mask[1] = True
    part = module.attend_dense(queries, kv, kv, 1.0, mask)
    assert bool((part.output[0] == 0).all())
    assert bool((part.logsumexp[0] == -mx.inf).all())
    assert bool(mx.isfinite(part.logsumexp[1]).all())
    seen = module.attend_dense(queries, kv, kv, 1.0, None)
    merged = merge([part, seen])
    np.testing.assert_allclose(np.array(merged.output), np.array(seen.output), atol=1e-5)
    nothing = merge([Partial(part.output[:1], part.logsumexp[:1])] * 2)
    assert bool((nothing.output == 0).all())
    assert bool((nothing.logsumexp == -mx.inf).all())


@both
def test_padding_may_contain_any_numbers(module: ModuleType) -> None:
    """Masked tokens may contain what an earlier batch left; in mlx-lm's own caches they are zeros."""
    queries, kv = mx.random.normal((1, 2, 1, 16)), mx.random.normal((1, 2, 8, 16))
    mask = mx.arange(8)[None, None, None] >= 3
    dirty = mx.concatenate([mx.full((1, 2, 3, 16), 1e30), kv[:, :, 3:]], axis=2)
    a, b = (module.attend_dense(queries, x, x, 1.0, mask) for x in (kv, dirty))
    np.testing.assert_allclose(np.array(a.output), np.array(b.output), atol=1e-6)


@both
@settings(deadline=None, max_examples=20)
@given(cuts=st.sets(st.integers(1, 49), max_size=4), loud=st.floats(1, 100))
def test_merged_parts_equal_the_whole(module: ModuleType, cuts: set[int], loud: float) -> None:
    queries, keys, values = (mx.random.normal((1, 2, n, 16), key=mx.random.key(n)) for n in (3, 50, 50))
    edges = [0, *sorted(cuts), 50]
    parts = [
        module.attend_dense(queries * loud, keys[:, :, a:b], values[:, :, a:b], 0.25, None)
        for a, b in itertools.pairwise(edges)
    ]
    whole = module.attend_dense(queries * loud, keys, values, 0.25, None)
    merged = merge(parts)
    np.testing.assert_allclose(np.array(merged.output), np.array(whole.output), atol=1e-4)
    np.testing.assert_allclose(np.array(merged.logsumexp), np.array(whole.logsumexp), rtol=1e-5)


@both
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_learned_sinks_have_the_same_effect_as_in_mlx(module: ModuleType, size: float) -> None:
    queries, keys, values = (mx.random.normal((2, h, n, 64)) for h, n in ((4, 3), (2, 40), (2, 40)))
    sinks = mx.random.normal((4,)) * size
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=SCALE, mask="causal", sinks=sinks)
    part = add_sink_logits(module.attend_dense(queries, keys, values, SCALE, "causal"), sinks[None, :, None])
    np.testing.assert_allclose(np.array(part.output), np.array(expected), atol=1e-5)


def test_learned_sinks_take_all_weight_if_nothing_is_visible() -> None:
    part = add_sink_logits(Partial(mx.zeros((1, 2, 1, 8)), mx.full((1, 2, 1), -mx.inf)), mx.ones((1, 2, 1)))
    assert bool((part.output == 0).all())
    assert bool((part.logsumexp == 1).all())


@settings(deadline=None, max_examples=20)
@given(batch=st.integers(1, 4), n_kv_heads=st.integers(1, 3), repeats=st.integers(1, 3), length=st.integers(1, 4))
def test_unfolding_undoes_folding(batch: int, n_kv_heads: int, repeats: int, length: int) -> None:
    queries = mx.random.normal((batch, n_kv_heads * repeats, length, 8))
    block = fold_queries(queries, n_kv_heads)
    assert block.shape == (n_kv_heads, batch * repeats * length, 8)
    part = unfold_part(Partial(block, block[..., 0]), queries.shape)
    assert mx.array_equal(part.output, queries)
    assert mx.array_equal(part.logsumexp, queries[..., 0])


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("dim", [17, 32, 64, 72, 80, 96, 128])
def test_decoding_by_the_table_agrees_with_unpacking(bits: int, dim: int) -> None:
    codec = CacheCodec(bits, bits).keys(dim)
    codes = mx.random.randint(0, 2**bits, (2, 5, dim))
    levels = cpu.decode_levels(np.asarray(pack(codes, bits)), codec)
    np.testing.assert_array_equal(levels, np.array(codec.levels[codes]))


def test_attention_does_not_change_its_inputs(random_layer: Callable[..., EncodedLayer]) -> None:
    """NumPy's views share MLX's memory, so attention must not write to them."""
    layer = random_layer(200, CacheCodec())
    queries, kv = mx.random.normal((1, 4, 3, 64)), mx.random.normal((1, 2, 50, 64))
    before = [np.array(x, copy=True) for x in (queries, kv, *layer.tensors().values())]
    cpu.attend_layer(queries, layer, 1.0)
    cpu.attend_dense(queries, kv, kv, 1.0, "causal")
    for old, new in zip(before, (queries, kv, *layer.tensors().values()), strict=True):
        np.testing.assert_array_equal(old, np.array(new))


def test_the_default_device_decides_the_backend() -> None:
    assert backend() is cpu


@pytest.mark.parametrize("usable", [True, False])
def test_a_gpu_uses_kernels_only_if_they_are_usable(
    usable: bool, monkeypatch: pytest.MonkeyPatch, random_layer: Callable[..., EncodedLayer]
) -> None:
    monkeypatch.setattr("turboquant.attention.dispatch.on_cpu", lambda: False)
    monkeypatch.setattr(attention_gpu, "usable", lambda codec, dim: usable)
    assert backend() is attention_gpu
    known, unknown = random_layer(20, CacheCodec()), random_layer(20, CacheCodec(), key_dim=80)
    assert has_kernel([known, known]) is usable
    assert not has_kernel([known, unknown])


def zeros_layer(tokens: int, heads: int, dim: int) -> EncodedLayer:
    codec = CacheCodec(4, 4, sinks=0, window=0)
    codes = mx.zeros((heads, tokens, codec.keys(dim).words), mx.uint32)
    scales, mean = mx.ones((heads, tokens), mx.float16), mx.zeros((heads, 1, dim))
    none = mx.zeros((heads, 0, dim), mx.float16)
    encoded = Encoded(codes, scales)
    nothing = Encoded(mx.zeros((heads, 0, codec.fine.keys(dim).words), mx.uint32), mx.zeros((heads, 0), mx.float16))
    return EncodedLayer(codec, none, none, encoded, encoded, nothing, nothing, mean, mean)


@pytest.mark.parametrize("resident", ["packed", "dense"])
def test_memory_at_a_long_context_is_bounded(resident: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the scores of a tile are in memory at a time."""
    heads, dim = 2, 64
    monkeypatch.setattr("turboquant.attention.dispatch.backend", lambda: reference)
    monkeypatch.setattr(reference, "SCORES", 1 << 18)
    peaks = []
    for tokens in (1 << 14, 1 << 16):
        layer: Any = zeros_layer(tokens, heads, dim)
        queries = mx.random.normal((16, 4, 2, dim))
        if resident == "dense":
            layer = layer.dense(mx.float16)
        mx.eval(queries, vars(layer) if resident == "dense" else layer.tensors())
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        part = attend_past(queries, layer, SCALE)
        mx.eval(part.output, part.logsumexp)
        peaks.append(mx.get_peak_memory() - before)
    scores = heads * 64 * 4 * (1 << 16)
    assert peaks[1] < scores / 2
    assert peaks[1] < 1.4 * peaks[0]  # four times the tokens


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    # A process of the tests has one thread. A user's run has as many as there are cores.
    keys, values = (mx.random.normal((4, 900, 64), key=mx.random.key(key)) for key in (0, 1))
    queries = mx.random.normal((2, 8, 300, 64), key=mx.random.key(2))
    collector = QueryCollector(900)
    collector.add(queries[:1], 4, 600, 0.125)

    def computed() -> list[mx.array]:
        layer = encode_layer(keys, values, CacheCodec(4, 3), collector.statistics())
        dense = cpu.attend_dense(queries[:1], keys[None, :, :300], values[None, :, :300], 0.125, "causal")
        packed = cpu.attend_layer(queries, layer, 0.125)
        return [dense.output, dense.logsumexp, packed.output, packed.logsumexp, *layer.tensors().values()]

    alone = computed()
    monkeypatch.setattr("turboquant.runtime.threads.thread_count", lambda: threads)
    assert all(mx.array_equal(one, other) for one, other in zip(alone, computed(), strict=True))


def test_products_do_not_warn_of_numbers_that_are_not_finite() -> None:
    # The BLAS may set the processor's flag for them by mistake, and pytest makes an error of each warning.
    product = cpu.multiply(np.array([[np.inf, 1]], np.float32), np.array([[0], [1]], np.float32))
    assert np.isnan(product).all()
