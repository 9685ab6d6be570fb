"""The cache that compresses its own past, fed directly, in models and in batches."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import make_prompt_cache

from tests.turboquant.conftest import VOCABULARY
from tests.turboquant.running import answer, assert_same, continue_on, cosine, random_kv
from turboquant import CacheCodec, EncodedLayer, Fork, TurboQuantKVCache, enabled
from turboquant.caches.streaming import BatchTurboQuantKVCache

Build = Callable[[str], Any]
Tokens = Callable[[int, int], list[int]]
EIGHT = CacheCodec(8, 8)


def feed(tq: TurboQuantKVCache, keys: mx.array, values: mx.array, edges: Sequence[int]) -> None:
    for start, stop in itertools.pairwise(edges):
        tq.update_and_fetch(keys[:, :, start:stop], values[:, :, start:stop])


def held(tq: TurboQuantKVCache) -> list[mx.array]:
    keys, values = tq.suffix.keys_and_values()
    return [*(tq.layer.tensors().values() if isinstance(tq.layer, EncodedLayer) else ()), keys, values]


@settings(deadline=None, max_examples=12)
@given(cuts=st.sets(st.integers(1, 599), max_size=8), codec=st.sampled_from([CacheCodec(), CacheCodec(3, 5, 0, 0)]))
def test_the_same_codes_however_tokens_arrive(cuts: set[int], codec: CacheCodec) -> None:
    keys, values = (mx.random.normal((1, 2, 601, 64), key=mx.random.key(i)) + i for i in range(2))
    at_once, chunked = TurboQuantKVCache(codec), TurboQuantKVCache(codec)
    feed(at_once, keys, values, [0, 600, 601])
    feed(chunked, keys, values, [0, *sorted(cuts), 600, 601])
    assert at_once.offset == chunked.offset == 601
    for a, b in zip(held(at_once), held(chunked), strict=True):
        assert mx.array_equal(a, b)


def test_the_same_codes_token_by_token() -> None:
    keys, values = (mx.random.normal((1, 2, 421, 64)) + i for i in range(2))
    at_once, single = (
        TurboQuantKVCache(CacheCodec(sinks=3, window=50)),
        TurboQuantKVCache(CacheCodec(sinks=3, window=50)),
    )
    feed(at_once, keys, values, [0, 420, 421])
    feed(single, keys, values, range(422))
    for a, b in zip(held(at_once), held(single), strict=True):
        assert mx.array_equal(a, b)


def test_sinks_and_the_latest_tokens_are_exact() -> None:
    keys, values = (mx.random.normal((1, 2, 1000, 64)).astype(mx.float16) for _ in range(2))
    tq = TurboQuantKVCache(CacheCodec(2, 2, sinks=4))
    feed(tq, keys, values, [*range(0, 1000, 100), 1000])
    assert isinstance(tq.layer, EncodedLayer)
    assert mx.array_equal(tq.layer.sink_keys, keys[0, :, :4])
    assert tq.suffix.offset >= 128
    assert tq.suffix.offset < 128 + 128 + 100  # no more than a window, a block and what was added last
    assert mx.array_equal(tq.suffix.keys_and_values()[0], keys[:, :, -tq.suffix.offset :])
    assert tq.layer.tokens + tq.suffix.offset == tq.offset == tq.size() == 1000
    assert tq.nbytes < 0.45 * (keys.nbytes + values.nbytes)
    assert tq.nbytes == tq.layer.nbytes + tq.suffix.offset * 2 * 2 * 64 * 2


def test_a_new_cache_is_empty() -> None:
    tq = TurboQuantKVCache()
    assert tq.empty()
    assert tq.nbytes == 0
    assert tq.offset == 0
    mx.eval(tq.state)
    assert tq.trim(3) == 0


@pytest.mark.parametrize("tokens", [0, 100, 500])
def test_a_cache_is_restored_from_its_state(tokens: int) -> None:
    keys, values = random_kv(700)
    tq = TurboQuantKVCache(CacheCodec(3, 5, layer_bits=((0, 2, 2),)))
    if tokens:
        feed(tq, keys, values, [0, tokens - 1, tokens])
    mx.eval(tq.state)
    again = TurboQuantKVCache.from_state(copy.deepcopy(tq.state))
    assert again.codec == tq.codec
    assert again.offset == tokens
    for cache in (tq, again):
        feed(cache, keys, values, [tokens, 699, 700])
    for x, y in zip(held(tq), held(again), strict=True):
        assert mx.array_equal(x, y)


@pytest.mark.parametrize("tokens", [0, 100, 500])
def test_its_state_passes_through_mlx_lm_s_files(tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm looks up classes in a module of its own, to which the test adds this one."""
    tq, path = TurboQuantKVCache(CacheCodec(3, 5)), str(tmp_path / "cache.safetensors")
    if tokens:
        feed(tq, *random_kv(tokens), [0, tokens - 1, tokens])
    monkeypatch.setattr(mlx_lm_cache, "TurboQuantKVCache", TurboQuantKVCache, raising=False)
    mlx_lm_cache.save_prompt_cache(path, [tq])
    (again,) = mlx_lm_cache.load_prompt_cache(path)
    assert again.codec == tq.codec
    assert again.offset == tokens
    if tokens:
        for x, y in zip(held(tq), held(again), strict=True):
            assert mx.array_equal(x, y)


def test_evaluating_the_state_evaluates_the_encoded_past() -> None:
    tq = TurboQuantKVCache()
    feed(tq, *random_kv(500), [0, 499, 500])
    assert isinstance(tq.layer, EncodedLayer)
    assert any(x is tq.layer.keys.codes for x in tq.state[1].values())


def test_masks_fit_what_is_left_in_full_precision() -> None:
    """Models make the mask before they add tokens, so compression must be done by then."""
    keys, values = random_kv(500)
    tq = TurboQuantKVCache()
    feed(tq, keys, values, [0, 490])
    mask = tq.make_mask(10, return_array=True)
    fetched, _ = tq.update_and_fetch(keys[:, :, 490:], values[:, :, 490:])
    assert isinstance(mask, mx.array)
    assert mask.shape == (10, fetched.shape[2])
    assert fetched.shape[2] < 490


@pytest.mark.parametrize("drop", [0, 1, 100, 241, 242, 250, 400, 495, 496, 498, 500])
@pytest.mark.parametrize("sinks", [0, 4])
def test_trimming_reaches_any_token(drop: int, sinks: int, exact_attention: Any) -> None:
    keys, values = (mx.random.normal((1, 2, 520, 64)) for _ in range(2))
    tq = TurboQuantKVCache(CacheCodec(8, 8, sinks=sinks))
    feed(tq, keys, values, [0, 499, 500])
    assert isinstance(tq.layer, EncodedLayer)
    assert tq.trim(drop) == drop
    assert tq.offset == 500 - drop
    queries = mx.random.normal((1, 4, 3, 64))
    end = 503 - drop
    fetched = tq.update_and_fetch(keys[:, :, end - 3 : end], values[:, :, end - 3 : end])
    output = tq.attend(queries, *fetched, scale=0.125, mask=tq_mask(tq, 3), sinks=None)
    visible = np.arange(end) <= np.arange(end - 3, end)[:, None]
    expected, _ = exact_attention(queries, keys[:, :, :end], values[:, :, :end], 0.125, visible)
    np.testing.assert_allclose(np.array(output), expected, atol=2e-2)
    feed(tq, keys, values, [end, 520])  # and it grows again
    feed(tq, keys, values, [end, 520])
    assert tq.offset == end + 2 * (520 - end)


def tq_mask(tq: TurboQuantKVCache, length: int) -> mx.array:
    """Return the causal mask for tokens that were just added."""
    tokens = tq.suffix.offset
    return (mx.arange(tokens)[None] <= mx.arange(tokens - length, tokens)[:, None])[None, None]


def test_trimming_more_than_there_is_drops_all() -> None:
    tq = TurboQuantKVCache()
    feed(tq, *random_kv(500), [0, 499, 500])
    assert tq.trim(10_000) == 500
    assert tq.offset == 0


def trimmed_to_sinks(dtype: mx.Dtype) -> TurboQuantKVCache:
    tq = TurboQuantKVCache(CacheCodec(window=0))
    feed(tq, *(x.astype(dtype) for x in random_kv(144)), [0, 144])
    tq.make_mask(1)
    assert tq.suffix.empty()
    assert tq.trim(140) == 140
    return tq


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_cache_keeps_its_dtype_when_it_is_trimmed_to_its_sinks(dtype: mx.Dtype) -> None:
    keys, values = (x.astype(dtype) for x in random_kv(10))
    fetched = trimmed_to_sinks(dtype).update_and_fetch(keys, values)
    for x, new in zip(fetched, (keys, values), strict=True):
        assert (x.dtype, x.shape[2]) == (dtype, 14)
        assert mx.array_equal(x[:, :, 4:], new)
    batch = TurboQuantKVCache.merge([trimmed_to_sinks(dtype), trimmed_to_sinks(dtype)])
    assert batch.update_and_fetch(*(mx.concatenate([x, x]) for x in (keys, values)))[0].dtype == dtype
    short = TurboQuantKVCache()
    short.update_and_fetch(keys, values)
    mixed = TurboQuantKVCache.merge([trimmed_to_sinks(dtype), short])
    assert mx.array_equal(mixed.suffix.extract(1).keys, keys)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [100, 500])
@pytest.mark.parametrize("which", [0, 1])
def test_numbers_that_are_not_finite_are_refused_in_any_block(bad: float, position: int, which: int) -> None:
    new = random_kv(700)
    new[which][:, 1, position, 5] = bad
    tq, batch = TurboQuantKVCache(), TurboQuantKVCache.merge([TurboQuantKVCache(), TurboQuantKVCache()])
    for cache, rows in ((tq, 1), (batch, 2)):
        keys, values = (mx.concatenate([x] * rows) for x in new)
        cache.update_and_fetch(keys[:, :, :400], values[:, :, :400])
        if position > 400:
            cache.update_and_fetch(keys[:, :, 400:], values[:, :, 400:])
        with pytest.raises(ValueError, match="not finite"):
            cache.make_mask(1)


def test_a_batch_of_rows_is_refused_with_the_way_out() -> None:
    two_rows = mx.zeros((2, 2, 5, 64))
    with pytest.raises(ValueError, match="merge"):
        TurboQuantKVCache().update_and_fetch(two_rows, two_rows)


def test_a_copy_is_independent() -> None:
    keys, values = random_kv(900)
    tq = TurboQuantKVCache()
    feed(tq, keys, values, [0, 500])
    copied = copy.deepcopy(tq)
    feed(tq, keys, values, [500, 899, 900])
    feed(copied, values, keys, [500, 700])
    assert (tq.offset, copied.offset) == (900, 700)
    expected = TurboQuantKVCache()
    feed(expected, keys, values, [0, 899, 900])
    for x, y in zip(held(tq), held(expected), strict=True):
        assert mx.array_equal(x, y)


@pytest.mark.parametrize("step", [512, 2048])
def test_memory_stays_below_full_precision_s_at_32k_tokens(step: int) -> None:
    """The prefill goes in steps, with attention, and K/V have 16 bits."""
    tokens = 32_768
    full = 2 * 2 * tokens * 64 * 2
    tq = TurboQuantKVCache()
    before = begin_to_measure()
    for start in range(0, tokens, step):
        keys, values = (x.astype(mx.float16) for x in random_kv(step))
        length = 512 if start + step == tokens else 1  # all attention of a whole prefill takes a CPU minutes
        mask = "causal" if length > 1 else None
        fetched = tq.update_and_fetch(keys, values)
        queries = mx.random.normal((1, 4, length, 64)).astype(mx.float16)
        mx.eval(tq.attend(queries, *fetched, scale=0.125, mask=mask, sinks=None), tq.state)
    assert tq.offset == tokens
    assert mx.get_peak_memory() - before < full
    assert tq.nbytes < 0.3 * full + 2 * 2 * step * 64 * 2  # the last step is not compressed yet


def test_forks_attend_below_full_precision_s_memory_at_32k_tokens(random_layer: Any) -> None:
    tokens, before = 32_768, begin_to_measure()
    full = 2 * 2 * tokens * 64 * 2
    forks = [Fork(random_layer(tokens, CacheCodec()))] * 8
    forks = [copy.deepcopy(fork) for fork in forks]
    mx.clear_cache()
    mx.reset_peak_memory()
    for fork in forks:
        fetched = fork.update_and_fetch(*random_kv(64))
        queries = mx.random.normal((1, 4, 64, 64))
        mx.eval(fork.attend(queries, *fetched, scale=0.125, mask="causal", sinks=None))
    assert mx.get_peak_memory() - before < full


def begin_to_measure() -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


# --- in a model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generation_through_mlx_lm_is_close_to_the_stock_cache(
    family: str, build_model: Build, random_tokens: Tokens
) -> None:
    model, prompt = build_model(family), random_tokens(600, 0)
    runs = []
    for caches in (make_prompt_cache(model), [TurboQuantKVCache(EIGHT) for _ in model.layers]):
        with enabled(model):
            steps = generate_step(mx.array(prompt), model, max_tokens=6, prompt_cache=caches, prefill_step_size=200)
            runs.append(list(steps))
        assert caches[0].offset == 606
    for (token, logprobs), (other, others) in zip(*runs, strict=True):
        assert cosine(mx.exp(logprobs), mx.exp(others)) > 0.999
        assert token == other


def test_a_model_that_is_not_made_to_attend_is_noticed(build_model: Build, random_tokens: Tokens) -> None:
    """Otherwise the model would answer from its latest tokens only."""
    model, batch = build_model("llama"), TurboQuantKVCache.merge
    for rows in (1, 2):
        caches: list[Any] = [TurboQuantKVCache() for _ in model.layers]
        continue_on(model, caches, random_tokens(500, 0))
        caches = caches if rows == 1 else [batch([c, copy.deepcopy(c)]) for c in caches]
        new = mx.array([[1]] * rows)
        model(new, cache=caches)
        with pytest.raises(RuntimeError, match=r"with turboquant\.enabled\(model\)"):
            model(new, cache=caches)


# --- in batches


class Row:
    """A cache of one row alone, and the tokens that are fed to it and to the same row of a batch."""

    def __init__(self, codec: CacheCodec, tokens: int) -> None:
        self.keys, self.values = random_kv(1600)
        self.alone = TurboQuantKVCache(codec)
        self.fed = 0
        if tokens:
            self.feed(tokens)

    def feed(self, tokens: int) -> tuple[mx.array, mx.array]:
        start, self.fed = self.fed, self.fed + tokens
        return self.alone.update_and_fetch(self.keys[:, :, start : self.fed], self.values[:, :, start : self.fed])

    def next(self, tokens: int, padding: int = 0) -> tuple[mx.array, mx.array]:
        some = [x[:, :, self.fed : self.fed + tokens] for x in (self.keys, self.values)]
        padded = [mx.concatenate([x, mx.full((1, 2, padding, 64), 1e4)], axis=2) for x in some]
        return padded[0], padded[1]


def feed_batch(batch: BatchTurboQuantKVCache, rows: Sequence[Row], tokens: int) -> None:
    """Feed tokens one by one, in the batch and alone, and compare attention of the last ones."""
    for left in range(tokens, 0, -1):
        mask = batch.make_mask(1) if left == 1 else None
        new = [mx.concatenate(x) for x in zip(*(row.next(1) for row in rows), strict=True)]
        fetched = batch.update_and_fetch(new[0], new[1])
        alone = [row.feed(1) for row in rows]
        if left == 1:
            queries = mx.random.normal((len(rows), 4, 1, 64))
            output = batch.attend(queries, *fetched, scale=0.125, mask=mask, sinks=None)
            for i, row in enumerate(rows):
                expected = row.alone.attend(queries[i : i + 1], *alone[i], scale=0.125, mask=None, sinks=None)
                np.testing.assert_allclose(np.array(output[i]), np.array(expected[0]), atol=1e-5)


def assert_rows(batch: BatchTurboQuantKVCache, rows: Sequence[Row]) -> None:
    assert batch.offset.tolist() == [row.fed for row in rows]
    for i, row in enumerate(rows):
        own = batch.extract(i)
        assert own.codec == row.alone.codec
        for x, y in zip(held(own), held(row.alone), strict=True):
            assert mx.array_equal(x, y)


def test_rows_of_a_batch_get_the_codes_they_get_alone() -> None:
    """Rows of different lengths are fed in chunks, then token by token; some rows leave and one joins."""
    codec = CacheCodec(4, 3, sinks=2, window=60)
    rows = [Row(codec, 400), Row(CacheCodec(5, 2), 10), Row(codec, 700), Row(codec, 0)]
    batch = TurboQuantKVCache.merge([row.alone for row in rows])
    lengths = [3, 390, 170, 200]
    prompts = [row.next(n, 390 - n) for row, n in zip(rows, lengths, strict=True)]
    keys, values = (mx.concatenate(x) for x in zip(*prompts, strict=True))
    batch.prepare(lengths=lengths, right_padding=[390 - n for n in lengths])
    for start in range(0, 390, 130):
        batch.update_and_fetch(keys[:, :, start : start + 130], values[:, :, start : start + 130])
    batch.finalize()
    for row, n in zip(rows, lengths, strict=True):
        row.feed(n)
    feed_batch(batch, rows, 150)
    assert_rows(batch, rows)
    assert batch.suffix.size() <= 128 + 128 + 1  # the longest window and a block: what is older is compressed
    batch.filter([2, 1])
    joining = Row(codec, 333)
    batch.extend(TurboQuantKVCache.merge([joining.alone]))
    rows = [rows[2], rows[1], joining]
    copied = copy.deepcopy(batch)
    feed_batch(batch, rows, 140)
    assert_rows(batch, rows)
    assert copied.offset.tolist() == [row.fed - 140 for row in rows]
    assert batch.nbytes < 0.5 * sum(row.alone.full_precision_nbytes for row in rows)


def test_left_padding_is_not_encoded() -> None:
    rows = [Row(CacheCodec(), 0), Row(CacheCodec(), 0)]
    batch = TurboQuantKVCache.merge([row.alone for row in rows])
    batch.prepare(left_padding=[200, 0])
    first, second = rows[0].next(200), rows[1].next(400)
    keys, values = (
        mx.concatenate([mx.concatenate([mx.full((1, 2, 200, 64), 1e4), x], axis=2), y])
        for x, y in zip(first, second, strict=True)
    )
    batch.update_and_fetch(keys, values)
    rows[0].feed(200)
    rows[1].feed(400)
    feed_batch(batch, rows, 130)
    assert_rows(batch, rows)


def test_trimming_a_batch_trims_every_row() -> None:
    rows = [Row(CacheCodec(), 400), Row(CacheCodec(), 30)]
    batch = TurboQuantKVCache.merge([row.alone for row in rows])
    feed_batch(batch, rows, 2)
    assert batch.trim(150) == 150
    assert batch.offset.tolist() == [252, 0]
    assert batch.extract(0).offset == 252


@pytest.mark.parametrize("empty", [True, False])
def test_batches_may_begin_empty(empty: bool) -> None:
    rows = [Row(CacheCodec(), 0), Row(CacheCodec(), 0 if empty else 300)]
    batch = TurboQuantKVCache.merge([row.alone for row in rows])
    assert batch.empty() is empty
    assert batch.extract(0).empty()
    feed_batch(batch, rows, 200)
    assert_rows(batch, rows)


def test_caches_of_other_kinds_cannot_join_a_batch() -> None:
    tq, fork = TurboQuantKVCache(), Fork(None)
    with pytest.raises(TypeError, match="only TurboQuantKVCaches"):
        TurboQuantKVCache.merge([tq, fork])
    with pytest.raises(TypeError, match="only TurboQuantKVCaches"):
        TurboQuantKVCache.merge([tq]).extend(Fork.merge([fork]))
    with pytest.raises(TypeError, match="only forks"):
        Fork.merge([fork, tq])


def filled(model: Any, codec: CacheCodec, tokens: list[int]) -> list[Any]:
    """Return a cache whose last token was added alone, so that older tokens are compressed."""
    caches: list[Any] = [TurboQuantKVCache(codec) for _ in model.layers]
    continue_on(model, caches, tokens[:-1])
    continue_on(model, caches, tokens[-1:])
    return caches


def test_caches_continue_to_be_compressed_in_a_batch_generator(build_model: Build, random_tokens: Tokens) -> None:
    """Some rows are long enough to be compressed, and one is compressed further in the batch."""
    model, codec = build_model("llama"), CacheCodec(6, 6)
    counts, suffixes, lengths = [400, 20, 700], [random_tokens(n, n) for n in (3, 8, 1)], [140, 3, 7]
    prompts = [random_tokens(count, count) for count in counts]
    alone = [
        answer(model, [filled(model, codec, p)], [s], [n], 1)[0][0]
        for p, s, n in zip(prompts, suffixes, lengths, strict=True)
    ]
    together, final = answer(model, [filled(model, codec, p) for p in prompts], suffixes, lengths, 3)
    assert_same(together, alone)
    for row, count, suffix, length in zip(final, counts, suffixes, lengths, strict=True):
        assert row[0].offset == count + len(suffix) + length
        assert isinstance(row[0], TurboQuantKVCache)
        assert row[0].suffix.offset < 128 + 128 + 8
    assert final[1][0].layer is None


def test_batch_generate_returns_caches_that_can_continue(build_model: Build, random_tokens: Tokens) -> None:
    class Tokenizer:
        eos_token_ids = (VOCABULARY,)

        def decode(self, tokens: list[int]) -> str:
            return " ".join(map(str, tokens))

    model, codec = build_model("llama"), CacheCodec(8, 8)
    prompts = [random_tokens(count, count) for count in (5, 300)]
    with enabled(model):
        caches = [[TurboQuantKVCache(codec) for _ in model.layers] for _ in prompts]
        for _ in range(2):
            done = batch_generate(
                model,
                Tokenizer(),
                [list(p) for p in prompts],
                caches,
                9,
                return_prompt_caches=True,
            )
            caches, prompts = done.caches, [[1], [2]]
    assert [row[0].offset for row in caches] == [5 + 9 + 1 + 9, 300 + 9 + 1 + 9]
    assert isinstance(caches[1][0].layer, EncodedLayer)
