"""Segments that are prefilled behind a compressed parent are joined to one prefix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from tests.turboquant.running import continue_on, cosine
from turboquant import CacheCodec, EncodedLayer, Prefix, prefill
from turboquant.caches.prefix import Segment, SegmentCache, concatenate_caches, join, make_resident, prefill_segment
from turboquant.io.identity import Identity
from turboquant.io.segment_file import read_segment, write_segment
from turboquant.quant.layer import DenseLayer

CODEC = CacheCodec(8, 8, window=16)
IDENTITY = Identity("w", "t", CODEC.identity, "exact")
TOKENS = [(7 * i * i + 3 * i) % 90 for i in range(230)]
MORE_TOKENS = [(7 * i * i + 3 * i) % 90 for i in range(300)]
NEXT = [5, 17, 2]


@pytest.fixture(scope="module")
def models(build_model: Callable[[str], Any]) -> dict[str, Any]:
    """Return models whose layers are all compressed, or stand beside sliding-window and recurrent layers."""
    return {family: build_model(family) for family in ("llama", "qwen2", "gemma3_text", "gpt_oss", "qwen3_next")}


def chain(
    model: Any, stops: list[int], codec: CacheCodec = CODEC, chunk: int = 32, tokens: list[int] = TOKENS
) -> list[Segment]:
    segments: list[Segment] = []
    for start, stop in zip([0, *stops], stops, strict=False):
        parent = join(segments) if segments else None
        segments.append(prefill_segment(model, tokens[start:stop], codec, parent, chunk))
    return segments


def contents(segment: Segment) -> list[Any]:
    found: list[Any] = [segment.start, segment.tokens]
    for layer in segment.layers:
        leaves: Any = tree_flatten(layer.tensors() if isinstance(layer, EncodedLayer) else layer.state)
        found += [(name, bytes(np.array(x)) if isinstance(x, mx.array) else x) for name, x in leaves]
    return found


def test_a_prefix_of_one_segment_equals_a_prefix_built_at_once(models: dict[str, Any]) -> None:
    for name in ("llama", "gemma3_text", "qwen3_next"):
        model = models[name]
        whole = prefill(model, TOKENS, CODEC, 32)
        (segment,) = chain(model, [len(TOKENS)])
        assert contents(segment) == contents(Segment(whole.layers, 0, len(TOKENS))), name


@pytest.mark.parametrize("stops", [[100, 230], [64, 128, 192, 230], [17, 18, 230]])
def test_a_chain_of_segments_answers_like_one_prefix(models: dict[str, Any], stops: list[int]) -> None:
    for name, model in models.items():
        prefix = join(chain(model, stops))
        assert prefix.tokens == 230
        whole = prefill(model, TOKENS, CODEC, 32)
        joined, once = (continue_on(model, p.fork(), NEXT) for p in (prefix, whole))
        assert cosine(joined, once) > 0.999, name
        dense = continue_on(model, make_resident([prefix], "dense")[0].fork(), NEXT)
        assert cosine(dense, joined) > 0.9999, name


def test_segments_in_trellis_codes_are_restored_and_joined(models: dict[str, Any], tmp_path: Path) -> None:
    codec, model = CacheCodec(4, 4, coding="trellis"), models["llama"]
    first, second = chain(model, [150, 300], codec, 32, MORE_TOKENS)
    assert [segment.layers[0].keys.tokens for segment in (first, second)] == [128, 128]
    write_segment(tmp_path, "key", first, replace(IDENTITY, codec=codec.identity))
    restored = read_segment(tmp_path, "key", codec)
    assert contents(prefill_segment(model, MORE_TOKENS[150:], codec, join([restored]), 32)) == contents(second)
    prefix = join([first, second])
    packed, dense = (continue_on(model, p.fork(), NEXT) for p in (prefix, make_resident([prefix], "dense")[0]))
    assert cosine(packed, dense) > 0.9999


def test_a_segment_does_not_depend_on_where_its_parent_came_from(models: dict[str, Any], tmp_path: Path) -> None:
    for name, model in models.items():
        built = chain(model, [90, 160, 230])
        restored: list[Segment] = []
        for index, segment in enumerate(built[:2]):
            folder = tmp_path / name / str(index)
            write_segment(folder, "key", segment, IDENTITY)
            restored.append(read_segment(folder, "key", CODEC, segment.start))
            assert contents(restored[-1]) == contents(segment), name
        again = prefill_segment(model, TOKENS[160:], CODEC, join(restored), 32)
        assert contents(again) == contents(built[2]), name


def test_a_grown_context_keeps_its_segments(models: dict[str, Any]) -> None:
    model = models["llama"]
    short, long = chain(model, [64, 128, 150]), chain(model, [64, 128, 192, 230])
    assert [contents(s) for s in short[:2]] == [contents(s) for s in long[:2]]


def test_a_plain_layer_is_stored_in_pieces(models: dict[str, Any]) -> None:
    """A layer that is not compressed and only grows must not be written as a whole with every segment."""
    caches = [KVCache(), KVCache()]
    for cache, length in zip(caches, (40, 30), strict=True):
        cache.update_and_fetch(mx.random.normal((1, 2, length, 8)), mx.random.normal((1, 2, length, 8)))
    whole = concatenate_caches(caches)
    assert whole.offset == 70
    assert mx.array_equal(concatenate_caches([whole], 40).keys, caches[1].keys_and_values()[0])
    assert concatenate_caches([whole], 40).offset == 30
    pieces = [Segment((caches[0],), 0, 40), Segment((caches[1],), 40, 30)]
    assert mx.array_equal(join(pieces).layers[0].keys, whole.keys)


def test_recurrent_layers_are_those_of_the_last_segment(models: dict[str, Any]) -> None:
    segments = chain(models["qwen3_next"], [100, 230])
    last = [layer for layer in segments[-1].layers if isinstance(layer, ArraysCache)]
    assert last
    assert [layer for layer in join(segments).layers if isinstance(layer, ArraysCache)] == last
    rotating = chain(models["gemma3_text"], [100, 230])[-1].layers
    assert {layer.offset for layer in rotating if isinstance(layer, RotatingKVCache)} == {230}


def test_sinks_are_the_context_s_first_tokens_only(models: dict[str, Any]) -> None:
    segments = chain(models["llama"], [10, 100, 230], CacheCodec(sinks=16, window=0, extra_bits=0))
    assert [segment.layers[0].sink_keys.shape[1] for segment in segments] == [10, 6, 0]
    assert join(segments).layers[0].sink_keys.shape[1] == 16


def test_means_are_frozen_by_the_first_segment(models: dict[str, Any]) -> None:
    first, second = chain(models["llama"], [100, 230])
    assert mx.array_equal(first.layers[0].key_mean, second.layers[0].key_mean)
    assert mx.array_equal(first.layers[0].value_mean, second.layers[0].value_mean)


def test_segments_that_do_not_follow_each_other_are_refused(models: dict[str, Any]) -> None:
    first, second = chain(models["llama"], [100, 230])
    with pytest.raises(ValueError, match="behind 100 tokens cannot follow one that ends at 0"):
        join([second])
    with pytest.raises(ValueError, match="behind 0 tokens cannot follow one that ends at 100"):
        join([first, first])
    other = prefill_segment(models["llama"], TOKENS[5:105], CODEC, None, 32)
    with pytest.raises(ValueError, match="different means"):
        join([other, second])


def test_what_a_segment_cannot_stand_behind_is_refused_before_the_model_runs(models: dict[str, Any]) -> None:
    model, ran = models["llama"], list[int]()
    parent = join(chain(model, [100]))
    for tokens, codec, behind, message in (
        ([], CODEC, None, "one token or more"),
        ([], CODEC, parent, "one token or more"),
        (TOKENS, CODEC, parent.dense(mx.float32), "not a decoded one"),
        (TOKENS, replace(CODEC, seed=1), parent, "different codecs cannot be joined: seed 0 and 1"),
        (TOKENS, replace(CODEC, layer_bits=((1, 4, 4),)), parent, "key_bits 8 and 4"),
        (TOKENS, replace(CODEC, layer_bits=((2, 4, 4),)), None, "layer_bits names layer 2, but the model has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill_segment(model, tokens, codec, behind, 32, ran.append)
    assert ran == []


def test_queries_share_their_attention_with_the_parent() -> None:
    """A segment's tokens get less attention where the parent gets most of it."""
    keys = mx.random.normal((1, 200, 32))
    queries = mx.random.normal((1, 2, 200, 32))
    looks = []
    for past in (-1e9, 50.0):
        cache = SegmentCache(DenseLayer(keys, keys), 200)
        cache.queries.add(queries, 1, 0, 0.2, mx.full((1, 2, 200), past))
        collected = cache.queries.statistics()
        assert collected is not None
        looks.append(collected.metric_and_attention(keys)[1])
    assert looks[1].sum() < 1e-6 * looks[0].sum()


def test_the_parent_is_not_changed(models: dict[str, Any]) -> None:
    for model in models.values():
        parent = join(chain(model, [100]))
        before = contents(Segment(parent.layers, 0, 100))
        prefill_segment(model, TOKENS[100:], CODEC, parent, 32)
        assert contents(Segment(parent.layers, 0, 100)) == before


def test_progress_is_reported_and_its_exceptions_end_the_prefill(models: dict[str, Any]) -> None:
    parent, done = join(chain(models["llama"], [100])), []
    prefill_segment(models["llama"], TOKENS[100:], CODEC, parent, 32, done.append)
    assert done == [32, 32, 32, 32, 2]
    with pytest.raises(KeyError):
        prefill_segment(models["llama"], TOKENS[100:], CODEC, parent, 32, lambda n: {}[n])
    assert isinstance(parent, Prefix)
