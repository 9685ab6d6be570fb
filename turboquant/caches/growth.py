"""An encoded past that grows: how many of a layer's tokens are due, and how they are put behind what is encoded.

Knows vectors and counts of tokens; whose they are, and what attends them, is streaming.py's.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from turboquant.kernels.encoding import encode_layer
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.codec import Codec, Encoded
from turboquant.quant.layer import EncodedLayer

BLOCK = 128  # tokens encoded at a time, so that the codes don't depend on how many are added at once
TILE = 4 * BLOCK  # tokens whose scratch is held at a time where more are due


def due(tokens: int, layer: EncodedLayer | None, codec: CacheCodec) -> int:
    """How many of the oldest ``tokens`` behind a past are to be encoded: whole blocks, and sinks before the first."""
    first = codec.sinks if layer is None else 0
    blocks = (tokens - first - codec.window) // BLOCK
    return first + blocks * BLOCK if blocks > 0 else 0


def grown(layer: EncodedLayer | None, keys: mx.array, values: mx.array, codec: CacheCodec) -> EncodedLayer:
    """The past with keys and values (n_kv_heads, n, head_dim) behind it.

    Copies the past once, which attention reads at every step.
    """
    if layer is None:
        first = codec.sinks + BLOCK
        # No window is due in this first part: the suffix is the window.
        layer = encode_layer(keys[:, :first], values[:, :first], replace(codec, window=0))
        keys, values = keys[:, first:], values[:, first:]
    return replace(
        layer,
        keys=_append(layer.keys, keys, layer.key_codec, layer.key_mean),
        values=_append(layer.values, values, layer.value_codec, layer.value_mean),
    )


def _append(encoded: Encoded, x: mx.array, codec: Codec, mean: mx.array) -> Encoded:
    parts = [encoded]
    for start in range(0, x.shape[1], TILE):
        parts.append(codec.encode(x[:, start : start + TILE], mean))
        mx.eval(parts[-1].codes, parts[-1].scales)
    if len(parts) == 1:
        return encoded
    whole = Encoded.concatenate(parts)
    mx.eval(whole.codes, whole.scales)
    return whole
