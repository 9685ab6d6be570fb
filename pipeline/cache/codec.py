"""The codec of a job: how its settings compress keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.job.job import Cache

if TYPE_CHECKING:
    from turboquant.quant.cache_codec import CacheCodec


def job_codec(cache: Cache) -> CacheCodec:
    """Return the codec that a job's cache settings describe."""
    from turboquant.quant.cache_codec import CacheCodec  # imports MLX, which a run with nothing to do does not need

    return CacheCodec(
        cache.key_bits,
        cache.value_bits,
        sinks=cache.sinks,
        window=cache.window,
        extra_bits=cache.extra_bits,
        layer_bits=tuple((layer, bits, bits) for layer, bits in cache.layer_bits.items()),
        coding=cache.coding,
    )
