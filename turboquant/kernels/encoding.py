"""Compressing the K/V of a finished context, one layer: which tokens are kept as they are, finer or as usual, and how.

Knows vectors and what a context's own queries looked at; what becomes of the tensors is layer.py's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant.kernels import encoding_gpu
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.codec import Codec, Encoded
from turboquant.quant.layer import EncodedLayer
from turboquant.quant.query_stats import QueryStatistics
from turboquant.quant.rounding import RoundingMetric
from turboquant.runtime.device import array_module, on_cpu

# Tokens encoded at a time, so that the encoder's float32 scratch stays small; a GPU needs more to be busy.
ENCODE_TILE, GPU_ENCODE_TILE = 4096, 1 << 14


def encode_layer(
    keys: mx.array,
    values: mx.array,
    codec: CacheCodec,
    queries: QueryStatistics | None = None,
    parent: EncodedLayer | None = None,
) -> EncodedLayer:
    """Compress the keys and values of one layer of a finished context.

    keys: (n_kv_heads, T, head_dim), any float dtype. values: (n_kv_heads, T, value_dim).
    queries: statistics of the context's own queries; they decide which tokens are kept finer and how keys are rounded.
    parent: the layer of the tokens before these. Its means are used again, so that the two layers can be joined.

    On a GPU the result may still be computed when this returns, so that the next layer can start meanwhile.
    Raises ValueError if keys or values are not finite.
    """
    codec = codec if parent is None else replace(codec, sinks=max(0, codec.sinks - parent.tokens))
    means = None if parent is None else (parent.key_mean, parent.value_mean)
    finite = mx.isfinite(keys).all() & mx.isfinite(values).all()
    mx.async_eval(finite)  # type: ignore[no-untyped-call]
    if on_cpu():  # NumPy may not bear what is not
        _check_finite(finite)
    first = min(codec.sinks, keys.shape[1])
    metric, order, fine = _plan(keys, codec, queries)
    in_metric = None if metric is None else _ready(metric, codec.keys(keys.shape[-1]))
    split = order.shape[1] - fine
    key_mean, value_mean = means or (_mean(keys[:, first:]), _mean(values[:, first:]))
    tensors = {
        "sink_keys": _half(keys[:, :first]),
        "sink_values": _half(values[:, :first]),
        "key_mean": key_mean,
        "value_mean": value_mean,
    }
    for prefix, which, codecs in (("", order[:, :split], codec), ("fine_", order[:, split:], codec.fine)):
        for name, x, own, mean, of in (
            ("key", keys, codecs.keys(keys.shape[-1]), key_mean, in_metric),
            ("value", values, codecs.values(values.shape[-1]), value_mean, None),
        ):
            encoded = _encode(x[:, first:], which, own, mean, of)
            tensors |= {f"{prefix}{name}_codes": encoded.codes, f"{prefix}{name}_scales": encoded.scales}
    mx.async_eval(list(tensors.values()))  # type: ignore[no-untyped-call]
    _check_finite(finite)
    return EncodedLayer.from_tensors(tensors, codec)


def _check_finite(finite: mx.array) -> None:
    if not finite:
        raise ValueError("K/V hold numbers that are not finite: the model overflows on this context")


def _plan(keys: mx.array, codec: CacheCodec, queries: QueryStatistics | None) -> tuple[Any, mx.array, int]:
    """The metric to round keys in, or None; the order (n_kv_heads, T - S) in which tokens behind the sinks are
    encoded, the finer ones last, int32; and how many those are.
    """
    heads, tokens, _ = keys.shape
    window, looked_at = codec.fine_tokens(tokens, queries is not None)
    count = max(0, tokens - codec.sinks)
    order = mx.broadcast_to(mx.arange(count, dtype=mx.int32), (heads, count))
    if queries is None:
        return None, order, window
    metric, looks = queries.metric_and_attention(keys)
    split = count - window - looked_at
    if 0 < split < count:
        xp = array_module()
        looks = xp.where(xp.arange(count) < count - window, looks[:, codec.sinks :], np.inf)
        by_looks = xp.argpartition(looks, split, axis=1)
        parts = [xp.sort(part, axis=1) for part in (by_looks[:, :split], by_looks[:, split:])]
        order = mx.array(xp.concatenate(parts, axis=1)).astype(mx.int32)
    return metric if codec.query_aware else None, order, window + looked_at


def _ready(metric: Any, codec: Codec) -> RoundingMetric:
    return codec.rounding_metric(metric, encoding_gpu.feedback if encoding_gpu.factors(codec.head_dim) else None)


def _mean(x: mx.array) -> mx.array:
    """(n_kv_heads, 1, head_dim) float32, zero for no tokens."""
    if x.shape[1] == 0:
        return mx.zeros((x.shape[0], 1, x.shape[2]), mx.float32)
    return x.astype(mx.float32).mean(axis=1, keepdims=True)


def _encode(x: mx.array, order: mx.array, codec: Codec, mean: mx.array, metric: RoundingMetric | None) -> Encoded:
    """Encode vectors of x (n_kv_heads, T, head_dim), those that ``order`` (n_kv_heads, E) names."""
    if order.shape[1] and encoding_gpu.usable(codec, x.dtype, metric is not None):
        return encoding_gpu.encode(x, order, mean[:, 0], codec, metric)
    parts, tile = [], ENCODE_TILE if on_cpu() else GPU_ENCODE_TILE
    for start in range(0, max(1, order.shape[1]), tile):
        some = mx.take_along_axis(x, order[:, start : start + tile, None], axis=1)
        part = codec.encode(some, mean, metric)
        mx.eval(part.codes, part.scales)
        parts.append(part)
    return parts[0] if len(parts) == 1 else Encoded.concatenate(parts)


def _half(x: mx.array) -> mx.array:
    """As 16-bit floats: bfloat16 stays, float32 (a model run on a CPU) becomes float16, saturating."""
    if x.dtype == mx.bfloat16:
        return mx.contiguous(x)
    return mx.contiguous(mx.clip(x, -65504.0, 65504.0).astype(mx.float16))
