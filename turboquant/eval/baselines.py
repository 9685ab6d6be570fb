"""Caches to be measured against full precision: this package's, exact and streaming, and mlx-lm's own quantised one.

Each counts all the bytes it holds, those in full precision as 16 bits a number.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from turboquant.caches.prefix import Prefix, Segment, feed, join, prefill_segment
from turboquant.caches.streaming import TurboQuantKVCache
from turboquant.eval.results import CannotRun, Contender, Filled
from turboquant.eval.teacher_forcing import Context
from turboquant.mlx_lm.internals import KVCache, QuantizedKVCache, kv_cache, make_prompt_cache
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.layer import EncodedLayer

GROUP_SIZES = (64, 32)  # mlx-lm's default, and one for heads that it does not divide


def exact(codec: CacheCodec) -> Contender:
    """The context prefilled in full precision, then encoded whole, as ``prefill`` does."""
    fill = functools.partial(_encode, codec=codec)
    return Contender("turboquant", codec.key_bits, codec.value_bits, "exact", fill, codec)


def streaming(codec: CacheCodec) -> Contender:
    """The context read through ``TurboQuantKVCache``, which compresses what has grown old."""
    fill = functools.partial(_stream, codec=codec)
    return Contender("turboquant", codec.key_bits, codec.value_bits, "streaming", fill)


def in_segments(codec: CacheCodec, length: int) -> Contender:
    """The context prefilled ``length`` tokens at a time, each segment behind the compressed ones before it."""
    fill = functools.partial(_chain, codec=codec, length=length)
    return Contender("turboquant", codec.key_bits, codec.value_bits, f"segments of {length}", fill)


def affine(bits: int, prefill: str = "exact") -> Contender:
    """mlx-lm's ``QuantizedKVCache``; to its bits come 32 a group, for scale and bias."""
    fill = functools.partial(_quantize if prefill == "exact" else _stream_quantized, bits=bits)
    return Contender("mlx-lm", bits, bits, prefill, fill)


def _encode(context: Context, codec: CacheCodec) -> Filled:
    prefix = Prefix.encode(copy.deepcopy(context.caches), len(context.tokens), codec, context.compressible)
    return Filled(prefix, sum(layer.nbytes for layer in prefix.layers if isinstance(layer, EncodedLayer)))


def _chain(context: Context, codec: CacheCodec, length: int) -> Filled:
    prefix: Prefix | None = None
    for start in range(0, len(context.tokens), length):
        tokens = context.tokens[start : start + length]
        segment = prefill_segment(context.model, tokens, codec, prefix, context.chunk)
        prefix = join([segment] if prefix is None else [Segment(prefix.layers, 0, prefix.tokens), segment])
    assert prefix is not None
    return Filled(prefix, sum(layer.nbytes for layer in prefix.layers if isinstance(layer, EncodedLayer)))


def _stream(context: Context, codec: CacheCodec) -> Filled:
    caches = _read_through(context, lambda layer: TurboQuantKVCache(codec.for_layer(layer, len(context.caches))))
    nbytes = 0
    for cache, yes in zip(caches, context.compressible, strict=True):
        if yes:
            cache.make_mask(1)  # compresses what is due before more is added
            nbytes += (cache.layer.nbytes if cache.layer is not None else 0) + _half_bytes(cache.suffix)
    return Filled(caches, nbytes)


def _quantize(context: Context, bits: int) -> Filled:
    caches, group_size = copy.deepcopy(context.caches), _group_size(context)
    for index, yes in enumerate(context.compressible):
        if yes:
            trimmed = kv_cache(*caches[index].keys_and_values())
            caches[index] = trimmed.to_quantized(group_size=group_size, bits=bits)
    with _explained():
        feed(context.model, copy.deepcopy(caches), context.tokens[-1:], 1)
    return Filled(caches, _quantized_bytes(context, caches))


def _stream_quantized(context: Context, bits: int) -> Filled:
    group_size = _group_size(context)
    with _explained():
        caches = _read_through(context, lambda _: QuantizedKVCache(group_size=group_size, bits=bits))
    return Filled(caches, _quantized_bytes(context, caches))


def _read_through(context: Context, make: Callable[[int], Any]) -> list[Any]:
    """Caches filled with the context: those of ``make(layer)`` where a layer is compressible, mlx-lm's elsewhere."""
    stock = make_prompt_cache(context.model)
    caches = [make(layer) if yes else stock[layer] for layer, yes in enumerate(context.compressible)]
    feed(context.model, caches, context.tokens, context.chunk)
    return caches


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """mlx-lm's quantised attention refuses attention sinks, and some backends lack it: it shows only when it runs."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise CannotRun(f"mlx-lm's quantised cache cannot run this model: {error}") from error


def _group_size(context: Context) -> int:
    return group_size_of([cache for cache, yes in zip(context.caches, context.compressible, strict=True) if yes])


def group_size_of(caches: Sequence[KVCache]) -> int:
    """The size of mlx-lm's quantisation groups for filled caches. Raises CannotRun where none divides their heads."""
    sizes = {x.shape[-1] for cache in caches for x in cache.keys_and_values()}
    for group_size in GROUP_SIZES:
        if all(size % group_size == 0 for size in sizes):
            return group_size
    raise CannotRun(f"mlx-lm's quantised cache cannot hold heads of {max(sizes)}")


def _quantized_bytes(context: Context, caches: list[Any]) -> int:
    quantized = [cache for cache, yes in zip(caches, context.compressible, strict=True) if yes]
    halves = [cache.keys_and_values() for cache in quantized]
    return sum(int(codes.nbytes) + 2 * (scales.size + biases.size) for pair in halves for codes, scales, biases in pair)


def _half_bytes(cache: KVCache) -> int:
    """Bytes of a full-precision cache's tokens at 16 bits a number."""
    return 0 if cache.empty() else 2 * sum(x.size for x in cache.keys_and_values())
