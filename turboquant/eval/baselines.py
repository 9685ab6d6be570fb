"""The caches that are compared with full precision: turboquant's own and mlx-lm's quantised cache.

Each function returns a ``Baseline``, which counts all bytes that its cache holds; a number in full precision counts as
16 bits.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from turboquant.caches.prefix import Prefix, Segment, feed, join, prefill_segment
from turboquant.caches.streaming import TurboQuantKVCache
from turboquant.eval.results import Baseline, CannotRun, Filled
from turboquant.eval.speed import group_size_for
from turboquant.eval.teacher_forcing import Context
from turboquant.mlx_lm.internals import KVCache, QuantizedKVCache, kv_cache, make_prompt_cache
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.layer import EncodedLayer


def exact(codec: CacheCodec) -> Baseline:
    """Prefill the context in full precision and then encode all of it, as ``prefill`` does."""

    def fill(context: Context) -> Filled:
        prefix = Prefix.encode(copy.deepcopy(context.caches), len(context.tokens), codec, context.compressible)
        return Filled(prefix, _encoded_bytes(prefix))

    return Baseline(_name(codec), codec.key_bits, codec.value_bits, "exact", fill, codec)


def in_segments(codec: CacheCodec, length: int) -> Baseline:
    """Prefill the context in segments of ``length`` tokens, each behind the compressed segments before it."""

    def fill(context: Context) -> Filled:
        prefix: Prefix | None = None
        for start in range(0, len(context.tokens), length):
            tokens = context.tokens[start : start + length]
            segment = prefill_segment(context.model, tokens, codec, prefix, context.chunk)
            prefix = join([segment] if prefix is None else [Segment(prefix.layers, 0, prefix.tokens), segment])
        assert prefix is not None
        return Filled(prefix, _encoded_bytes(prefix))

    return Baseline(_name(codec), codec.key_bits, codec.value_bits, f"segments of {length}", fill)


def _name(codec: CacheCodec) -> str:
    return "turboquant" if codec.coding == "scalar" else f"turboquant, {codec.coding}"


def streaming(codec: CacheCodec) -> Baseline:
    """Read the context through ``TurboQuantKVCache``, which compresses old tokens while it grows."""

    def fill(context: Context) -> Filled:
        caches = _read_through(context, lambda layer: TurboQuantKVCache(codec.for_layer(layer, len(context.caches))))
        nbytes = 0
        for cache in _compressible(context, caches):
            cache.make_mask(1)  # compresses the tokens that are due
            suffix = () if cache.suffix.empty() else cache.suffix.keys_and_values()
            nbytes += (cache.layer.nbytes if cache.layer is not None else 0) + 2 * sum(x.size for x in suffix)
        return Filled(caches, nbytes)

    return Baseline("turboquant", codec.key_bits, codec.value_bits, "streaming", fill)


def affine(bits: int, prefill: str = "exact") -> Baseline:
    """Use mlx-lm's ``QuantizedKVCache``, which needs 32 bits more for each group, for its scale and bias."""

    def quantize(context: Context) -> Filled:
        caches, group_size = copy.deepcopy(context.caches), group_size_of(_compressible(context, context.caches))
        for index, yes in enumerate(context.compressible):
            if yes:
                trimmed = kv_cache(*caches[index].keys_and_values())
                caches[index] = trimmed.to_quantized(group_size=group_size, bits=bits)
        with _raising_cannot_run():
            feed(context.model, copy.deepcopy(caches), context.tokens[-1:], 1)
        return Filled(caches, quantized_bytes(context, caches))

    def stream(context: Context) -> Filled:
        group_size = group_size_of(_compressible(context, context.caches))
        with _raising_cannot_run():
            caches = _read_through(context, lambda _: QuantizedKVCache(group_size=group_size, bits=bits))
        return Filled(caches, quantized_bytes(context, caches))

    def quantized_bytes(context: Context, caches: list[Any]) -> int:
        halves = [half for cache in _compressible(context, caches) for half in cache.keys_and_values()]
        return sum(int(codes.nbytes) + 2 * (scales.size + biases.size) for codes, scales, biases in halves)

    return Baseline("mlx-lm", bits, bits, prefill, quantize if prefill == "exact" else stream)


def group_size_of(caches: Sequence[KVCache]) -> int:
    """Return a size of mlx-lm's quantisation groups that divides the heads of filled caches, or raise CannotRun."""
    sizes = {x.shape[-1] for cache in caches for x in cache.keys_and_values()}
    if group_size := group_size_for(sizes):
        return group_size
    raise CannotRun(f"mlx-lm's quantised cache cannot hold heads of {max(sizes)}")


def _read_through(context: Context, make: Callable[[int], Any]) -> list[Any]:
    """Return caches filled with the context: ``make(layer)`` for compressible layers, mlx-lm's for the others."""
    stock = make_prompt_cache(context.model)
    caches = [make(layer) if yes else stock[layer] for layer, yes in enumerate(context.compressible)]
    feed(context.model, caches, context.tokens, context.chunk)
    return caches


def _compressible(context: Context, caches: Sequence[Any]) -> list[Any]:
    return [cache for cache, yes in zip(caches, context.compressible, strict=True) if yes]


def _encoded_bytes(prefix: Prefix) -> int:
    """Count bytes. Layers that are not compressed have all tokens as sinks, which may be float32."""
    layers = [layer for layer in prefix.layers if isinstance(layer, EncodedLayer)]
    tensors = [item for layer in layers for item in layer.tensors().items()]
    return sum(2 * x.size if name.startswith("sink_") else int(x.nbytes) for name, x in tensors)


@contextlib.contextmanager
def _raising_cannot_run() -> Iterator[None]:
    """Raise CannotRun for an error of the block.

    mlx-lm's quantised attention refuses attention sinks, and some backends lack it, which shows only when it runs.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise CannotRun(f"mlx-lm's quantised cache cannot run this model: {error}") from error
