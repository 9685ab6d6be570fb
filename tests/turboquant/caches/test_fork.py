"""Compressed caches inside real mlx-lm models: prefixes, their forks, and batches of forks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from tests.turboquant.running import answer, assert_same, continue_on, cosine, random_kv
from turboquant import CacheCodec, EncodedLayer, Fork, Prefix, TurboQuantKVCache
from turboquant.caches import fork as cache
from turboquant.caches.fork import BatchForks
from turboquant.caches.prefix import PrefillCache
from turboquant.mlx_lm.families import explain

Build = Callable[[str], Any]
Tokens = Callable[[int, int], list[int]]
FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_oss", "qwen3_next"]
EIGHT = CacheCodec(8, 8)
TRELLIS = ("llama", "trellis", 200)  # tokens enough for a block


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bit_forks_are_close_to_the_stock_cache(
    family: str, build_model: Build, fill: Any, build_prefix: Any, random_tokens: Tokens
) -> None:
    model, context, query = build_model(family), random_tokens(150, 0), random_tokens(9, 1)
    stock = fill(model, context)
    expected = continue_on(model, stock, query)
    fork = build_prefix(model, context, EIGHT).fork()
    got = continue_on(model, fork, query)
    assert cosine(got, expected) > 0.999
    for token in random_tokens(3, 2):
        assert cosine(continue_on(model, fork, [token]), continue_on(model, stock, [token])) > 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_the_compressed_past_matters(family: str, build_model: Build, build_prefix: Any, random_tokens: Tokens) -> None:
    """Another context gives other logits, so the test above would notice a past that is ignored."""
    model, query = build_model(family), random_tokens(9, 1)
    a, b = (continue_on(model, build_prefix(model, random_tokens(150, s), EIGHT).fork(), query) for s in (0, 5))
    assert cosine(a, b) < 0.99


@pytest.mark.parametrize(("family", "coding", "count"), [*((name, "scalar", 120) for name in FAMILIES), TRELLIS])
def test_forks_in_a_batch_answer_as_they_do_alone(
    family: str, coding: str, count: int, build_model: Build, build_prefix: Any, random_tokens: Tokens
) -> None:
    """Rows have different lengths, and join the batch as others leave it."""
    model = build_model(family)
    prefix = build_prefix(model, random_tokens(count, 0), CacheCodec(4, 3, coding=coding))
    suffixes = [random_tokens(n, n) for n in (1, 7, 3, 12, 5)]
    lengths = [6, 2, 9, 4, 1]
    alone = [answer(model, [prefix.fork()], [s], [n], 1)[0][0] for s, n in zip(suffixes, lengths, strict=True)]
    for rows in (2, 8):
        together, final = answer(model, [prefix.fork() for _ in suffixes], suffixes, lengths, rows)
        assert_same(together, alone)
        assert [len(row.tokens) for row in together] == lengths
        for row, suffix, length in zip(final, suffixes, lengths, strict=True):
            for layer, held in zip(row, prefix.layers, strict=True):
                if isinstance(held, EncodedLayer):
                    assert layer.layer is held  # shared, not copied
                    assert layer.offset == count + len(suffix) + length


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_rows_on_different_prefixes_share_a_batch(
    family: str, build_model: Build, build_prefix: Any, random_tokens: Tokens
) -> None:
    model = build_model(family)
    prefixes = [build_prefix(model, random_tokens(count, count), CacheCodec()) for count in (60, 133)]
    order = [0, 1, 1, 0, 1]
    suffixes = [random_tokens(count, count) for count in (4, 2, 9, 1, 6)]
    lengths = [7, 3, 5, 2, 8]
    alone = [
        answer(model, [prefixes[p].fork()], [s], [n], 1)[0][0] for p, s, n in zip(order, suffixes, lengths, strict=True)
    ]
    assert_same(answer(model, [prefixes[p].fork() for p in order], suffixes, lengths, 4)[0], alone)


@pytest.mark.parametrize("coding", ["scalar", "trellis"])
def test_dense_and_packed_prefixes_answer_alike(
    coding: str, build_model: Build, build_prefix: Any, random_tokens: Tokens
) -> None:
    model = build_model("llama")
    packed = build_prefix(model, random_tokens(200, 0), CacheCodec(3, 3, coding=coding))
    dense = packed.dense(mx.float32)
    query = random_tokens(5, 1)
    a, b = (continue_on(model, prefix.fork(), query) for prefix in (packed, dense))
    np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4 * float(mx.abs(a).max()))
    assert dense.nbytes == 4 * packed.dense_elements
    alone = [answer(model, [packed.fork()], [s], [4], 1)[0][0] for s in (query, query[:2])]
    assert_same(answer(model, [dense.fork(), dense.fork()], [query, query[:2]], [4, 4], 2)[0], alone)


@pytest.mark.parametrize("resident", ["packed", "dense"])
def test_rows_on_one_prefix_cost_their_suffixes_only(
    resident: str, build_model: Build, random_layer: Any, random_tokens: Tokens
) -> None:
    model, tokens = build_model("llama"), 30_000
    prefix = Prefix(tuple(random_layer(tokens, CacheCodec()) for _ in range(2)), tokens)
    if resident == "dense":
        prefix = prefix.dense(mx.float32)
    forks = [prefix.fork() for _ in range(16)]
    assert sum(layer.nbytes for fork in forks for layer in fork) == 0
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    _, final = answer(model, forks, [random_tokens(3, row) for row in range(16)], [3] * 16, 16)
    grown = mx.get_peak_memory() - before
    suffixes = 16 * 2 * 2 * 2 * 256 * 64 * 4  # rows, layers, K and V, KV heads, mlx-lm's step of tokens, head_dim
    assert grown < 2.5 * suffixes + 2_000_000 < 16 * prefix.nbytes / 4
    assert all(layer.nbytes < suffixes / 16 for row in final for layer in row)


def test_a_fork_leaves_its_prefix_and_its_siblings_alone(
    build_model: Build, build_prefix: Any, random_tokens: Tokens
) -> None:
    for family in ("llama", "gemma3_text", "qwen3_next"):
        model = build_model(family)
        prefix = build_prefix(model, random_tokens(100, 0), CacheCodec())
        query = random_tokens(6, 1)
        first = continue_on(model, prefix.fork(), query)
        spoiled = prefix.fork()
        continue_on(model, spoiled, random_tokens(50, 3))
        copied = copy.deepcopy(spoiled)
        continue_on(model, copied, random_tokens(20, 4))
        if family == "llama":
            assert [layer.trim(70) for layer in spoiled] == [50, 50]
            assert mx.array_equal(continue_on(model, spoiled, query), first)
        assert mx.array_equal(continue_on(model, prefix.fork(), query), first)


def test_a_deep_copy_of_a_fork_is_independent_and_shares_the_past(
    build_model: Build, build_prefix: Any, random_tokens: Tokens
) -> None:
    model = build_model("llama")
    fork = build_prefix(model, random_tokens(100, 0), CacheCodec()).fork()
    continue_on(model, fork, random_tokens(5, 1))
    copied = copy.deepcopy(fork)
    a = continue_on(model, fork, [1])
    continue_on(model, fork, [2, 3])
    assert copied[0].layer is fork[0].layer
    assert copied[0].offset == 105
    assert mx.array_equal(continue_on(model, copied, [1]), a)


def test_forks_merge_and_come_back(random_layer: Any) -> None:
    layers = [random_layer(50, CacheCodec()), random_layer(70, CacheCodec())]
    forks = [Fork(layers[0]), Fork(layers[1]), Fork(layers[0])]
    for count, fork in zip((3, 0, 5), forks, strict=True):
        if count:
            fork.update_and_fetch(*(mx.random.normal((1, 2, count, 64)) for _ in range(2)))
    batch = Fork.merge(forks)
    assert batch.offset.tolist() == [53, 70, 55]
    assert batch.offset is batch.offset  # a model asks for it twice in each layer
    for row, fork in enumerate(forks):
        again = batch.extract(row)
        assert again.layer is fork.layer
        assert again.offset == fork.offset
        if not fork.suffix.empty():
            assert mx.array_equal(again.suffix.keys, fork.suffix.keys_and_values()[0])
    batch.filter([2, 0])
    batch.extend(Fork.merge([forks[1]]))
    assert batch.offset.tolist() == [55, 53, 70]
    assert [layer is layers[i] for layer, i in zip(batch.layers, (0, 0, 1), strict=True)] == [True] * 3
    assert copy.deepcopy(batch).layers[0] is layers[0]
    assert batch.trim(2) == 2
    assert batch.offset.tolist() == [53, 51, 68]
    assert batch.size() == 3
    assert batch.is_trimmable()
    assert not batch.empty()


@pytest.mark.parametrize("learned", [False, True])
def test_each_row_attends_its_own_past_and_suffix(learned: bool, random_layer: Any) -> None:
    """Rows stand in an order that is not its own inverse, with the learned sinks of gpt-oss and without."""
    layers = [random_layer(count, CacheCodec()) for count in (40, 90, 70)]
    forks = [Fork(layers[i]) for i in (2, 0, 1, 2, 0, 1, 1)]
    for fork in forks:
        fork.update_and_fetch(*random_kv(5))
    batch = Fork.merge(forks)
    queries, new = mx.random.normal((7, 4, 1, 64)), mx.random.normal((2, 7, 2, 1, 64))
    sinks = 4 * mx.random.normal((4,)) + 4 if learned else None
    mask = batch.make_mask(1)
    together = batch.attend(queries, *batch.update_and_fetch(new[0], new[1]), scale=0.125, mask=mask, sinks=sinks)
    for row, fork in enumerate(forks):
        one = slice(row, row + 1)
        fetched = fork.update_and_fetch(new[0, one], new[1, one])
        alone = fork.attend(queries[one], *fetched, scale=0.125, mask=None, sinks=sinks)
        assert fork.layer is not None
        past = fork.layer.decode() if isinstance(fork.layer, EncodedLayer) else ()
        keys, values = (mx.concatenate([x[None], y], axis=2) for x, y in zip(past, fetched, strict=True))
        expected = mx.fast.scaled_dot_product_attention(queries[one], keys, values, scale=0.125, sinks=sinks)
        np.testing.assert_allclose(np.array(alone), np.array(expected), atol=1e-4)
        np.testing.assert_allclose(np.array(together[one]), np.array(expected), atol=1e-4)


def test_masks_that_are_arrays_are_those_that_are_words(random_layer: Any) -> None:
    for one in (Fork(random_layer(50, CacheCodec())), Fork(None), TurboQuantKVCache(), PrefillCache(20)):
        one.update_and_fetch(*random_kv(7))
        word, array = (one.make_mask(5, return_array=yes, window_size=None) for yes in (False, True))
        queries, fetched = mx.random.normal((1, 4, 5, 64)), one.update_and_fetch(*random_kv(5))
        expected, got = (one.attend(queries, *fetched, scale=0.125, mask=mask, sinks=None) for mask in (word, array))
        assert (word, array.shape) == ("causal", (5, 12))
        np.testing.assert_allclose(np.array(got), np.array(expected), atol=1e-5)


def test_a_batch_without_suffixes_is_empty(random_layer: Any) -> None:
    batch = Fork.merge([Fork(random_layer(50, CacheCodec())) for _ in range(3)])
    assert batch.empty()
    assert batch.nbytes == 0
    assert batch.state == []
    assert batch.extract(1).offset == 50


@pytest.mark.parametrize("batched", [False, True])
def test_a_sliding_window_is_refused_rather_than_ignored(batched: bool) -> None:
    one: Any = Fork.merge([Fork(None)]) if batched else Fork(None)
    with pytest.raises(ValueError, match="sliding-window"):
        one.make_mask(3, window_size=16)


@pytest.mark.parametrize("cls", [Fork, BatchForks, TurboQuantKVCache, PrefillCache])
def test_no_cache_looks_like_mlx_lm_s_quantised_one(cls: type) -> None:
    instances = [Fork(None), Fork.merge([Fork(None)]), TurboQuantKVCache(), PrefillCache(3)]
    (instance,) = (x for x in instances if type(x) is cls)
    assert not hasattr(instance, "bits")
    assert not hasattr(instance, "to_quantized") or isinstance(instance, KVCache)


# --- building a prefix


@pytest.mark.parametrize("family", FAMILIES)
def test_prefilling_in_chunks_with_the_prefill_cache_is_prefilling(
    family: str, build_model: Build, fill: Any, random_tokens: Tokens
) -> None:
    model, tokens = build_model(family), random_tokens(90, 0)
    stock = fill(model, tokens)
    caches = [
        PrefillCache(90) if yes else c for yes, c in zip(explain(model).layers, make_prompt_cache(model), strict=True)
    ]
    for start in range(0, 90, 40):
        continue_on(model, caches, tokens[start : start + 40])
    for ours, theirs in zip(caches, stock, strict=True):
        if isinstance(ours, PrefillCache):
            assert ours.keys.shape[2] == 90  # allocated once
            for a, b in zip(ours.keys_and_values(), theirs.keys_and_values(), strict=True):
                np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-4)


def test_a_prefix_holds_encoded_layers_and_reports_their_size(
    build_model: Build, build_prefix: Any, random_tokens: Tokens
) -> None:
    prefix = build_prefix(build_model("gemma3_text"), random_tokens(400, 0), CacheCodec(4, 4))
    assert [isinstance(layer, EncodedLayer) for layer in prefix.layers] == [False, True, False, True]
    assert [type(layer).__name__ for layer in prefix.layers[::2]] == ["RotatingKVCache"] * 2
    assert prefix.nbytes == sum(layer.nbytes for layer in prefix.layers)
    assert 4.25 < prefix.effective_bits < 5.1  # 16 of the 400 tokens are kept as they are
    assert all(layer.tokens == 400 for layer in prefix.layers[1::2])


def test_layers_not_to_be_compressed_lose_their_unused_buffers(
    build_model: Build, fill: Any, random_tokens: Tokens
) -> None:
    model, tokens = build_model("llama"), random_tokens(30, 0)
    expected = continue_on(model, fill(model, tokens), [1, 2])
    prefix = Prefix.encode(fill(model, tokens), 30, EIGHT, [False, False])
    assert prefix.nbytes == 2 * 2 * 2 * 30 * 64 * 4
    assert prefix.effective_bits == 0
    np.testing.assert_allclose(np.array(continue_on(model, prefix.fork(), [1, 2])), np.array(expected), atol=1e-5)


def test_encoding_empties_the_full_precision_cache(build_model: Build, fill: Any, random_tokens: Tokens) -> None:
    caches = fill(build_model("llama"), random_tokens(30, 0))
    Prefix.encode(caches, 30, EIGHT)
    assert all(c.keys is None and c.values is None for c in caches)


def test_a_cache_that_is_refused_is_left_alone(build_model: Build, fill: Any, random_tokens: Tokens) -> None:
    caches = fill(build_model("llama"), random_tokens(30, 0))
    caches[1].trim(1)
    with pytest.raises(ValueError, match="layer 1 does not hold 30 tokens"):
        Prefix.encode(caches, 30, EIGHT)
    with pytest.raises(ValueError, match="layer_bits names layer 2"):
        Prefix.encode(caches, 30, CacheCodec(layer_bits=((2, 8, 8),)))
    assert [cache.offset for cache in caches] == [30, 29]


def test_a_cache_of_other_tokens_is_refused(build_model: Build, fill: Any, random_tokens: Tokens) -> None:
    model = build_model("llama")
    caches = fill(model, random_tokens(30, 0))
    with pytest.raises(ValueError, match="layer 0 does not hold 31 tokens"):
        Prefix.encode(caches, 31, EIGHT)
    with pytest.raises(ValueError, match="layer 0 does not hold 0 tokens"):
        Prefix.encode(make_prompt_cache(model), 0, EIGHT)
    two_rows = make_prompt_cache(model)
    model(mx.zeros((2, 30), mx.int32), cache=two_rows)
    with pytest.raises(ValueError, match="of one row"):
        Prefix.encode(two_rows, 30, EIGHT)


def test_the_docstring_s_list_of_classes_is_complete() -> None:
    classes = {n for n, x in vars(cache).items() if isinstance(x, type) and x.__module__ == cache.__name__}
    assert all(name in (cache.__doc__ or "") for name in classes if not name.startswith("_"))
