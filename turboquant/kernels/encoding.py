"""Compress the keys and values of a finished context, layer by layer.

This module decides which tokens are kept uncompressed, which finer, and in which metric keys are rounded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant.kernels import encoding_gpu, query_stats_gpu, trellis_search
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.codec import Codec, Encoded
from turboquant.quant.layer import EncodedLayer
from turboquant.quant.query_stats import QueryStatistics
from turboquant.quant.rounding import RoundingMetric
from turboquant.quant.trellis import TrellisCodec, attention_weights
from turboquant.runtime.device import array_module, as_float32, on_cpu

# Tokens that are encoded at a time, so that temporary float32 arrays stay small; a GPU needs more to be busy.
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
    queries: statistics of the context's own queries, which decide which tokens are kept finer and how keys are rounded.
    parent: the layer of the tokens before these. Its means are used again, so that the two layers can be joined.

    On a GPU the result may still be computed when this function returns, so that the next layer can start.
    Raises ValueError if keys or values are not finite.
    """
    codec = codec if parent is None else replace(codec, sinks=max(0, codec.sinks - parent.tokens))
    if codec.is_uncompressed:
        codec = replace(codec, sinks=keys.shape[1])
    means = None if parent is None else (parent.key_mean, parent.value_mean)
    finite = _are_finite(keys, values)
    if on_cpu():  # where NumPy computes, and may fail on other numbers
        _require(finite)
    first = min(codec.sinks, keys.shape[1])
    metric, attention, order, fine = order_tokens(keys, codec, queries)
    coarse_metric = fine_metric = None
    if metric is not None:
        factorise = encoding_gpu.feedback if encoding_gpu.factors(keys.shape[-1]) else None
        key_codec = codec.keys(keys.shape[-1])
        coarse_metric = fine_metric = key_codec.rounding_metric(metric, factorise)
        if isinstance(key_codec, TrellisCodec):  # its coordinates have another order
            fine_metric = codec.fine.keys(keys.shape[-1]).rounding_metric(metric, factorise)
    weighted = codec.coding == "trellis" and attention is not None
    weights = mx.array(attention_weights(attention)) if weighted else None
    split = order.shape[1] - fine
    key_mean, value_mean = means or (_mean(keys[:, first:]), _mean(values[:, first:]))
    tensors = {
        "sink_keys": mx.contiguous(keys) if codec.is_uncompressed else _to_16_bits(keys[:, :first]),
        "sink_values": mx.contiguous(values) if codec.is_uncompressed else _to_16_bits(values[:, :first]),
        "key_mean": key_mean,
        "value_mean": value_mean,
    }
    for prefix, some, codecs, rounding_metric in (
        ("", order[:, :split], codec, coarse_metric),
        ("fine_", order[:, split:], codec.fine, fine_metric),
    ):
        for name, x, vector_codec, mean, in_metric in (
            ("key", keys, codecs.keys(keys.shape[-1]), key_mean, rounding_metric),
            ("value", values, codecs.values(values.shape[-1]), value_mean, None),
        ):
            if isinstance(vector_codec, TrellisCodec):
                encoded = _encode_blocks(x, first + some, vector_codec, mean, in_metric, weights)
            else:
                encoded = _encode(x, first, some, vector_codec, mean, in_metric)
            tensors |= {f"{prefix}{name}_codes": encoded.codes, f"{prefix}{name}_scales": encoded.scales}
    mx.async_eval(list(tensors.values()))  # type: ignore[no-untyped-call]
    _require(finite)
    return EncodedLayer.from_tensors(tensors, codec)


def require_finite(keys: mx.array, values: mx.array) -> None:
    """Raise ValueError if keys or values are not finite."""
    _require(_are_finite(keys, values))


def _are_finite(keys: mx.array, values: mx.array) -> mx.array | bool:
    if on_cpu():
        return all(np.isfinite(as_float32(np, x)).all() for x in (keys, values))
    finite = mx.isfinite(keys).all() & mx.isfinite(values).all()
    mx.async_eval(finite)  # type: ignore[no-untyped-call]
    return finite


def _require(finite: mx.array | bool) -> None:
    if not finite:
        raise ValueError("K/V hold numbers that are not finite: the model overflows on this context")


def order_tokens(keys: mx.array, codec: CacheCodec, queries: QueryStatistics | None) -> tuple[Any, Any, mx.array, int]:
    """Order the tokens after the sinks, so that the finer ones come last.

    Returns the metric in which keys are rounded, or None; the squared attention that each token gets from the context's
    own queries, (n_kv_heads, T) of ``device.array_module``, or None; the tokens in their order, (n_kv_heads, T - S)
    int32, counted from the end of the sinks; and the number of finer ones.
    """
    heads, tokens, _ = keys.shape
    window, attended = codec.fine_tokens(tokens, queries is not None)
    count = max(0, tokens - codec.sinks)
    order = mx.broadcast_to(mx.arange(count, dtype=mx.int32), (heads, count))
    if queries is None:
        return None, None, order, window
    kernel = query_stats_gpu.squared_attention if query_stats_gpu.usable() else None
    metric, attention = queries.metric_and_attention(keys, kernel)
    split = count - window - attended
    if 0 < split < count:
        xp = array_module()
        ranked = xp.where(xp.arange(count) < count - window, attention[:, codec.sinks :], np.inf)
        by_attention = xp.argpartition(ranked, split, axis=1)
        parts = [xp.sort(part, axis=1) for part in (by_attention[:, :split], by_attention[:, split:])]
        order = mx.array(xp.concatenate(parts, axis=1)).astype(mx.int32)
    return metric if codec.query_aware else None, attention, order, window + attended


def _mean(x: mx.array) -> mx.array:
    """Return the mean of all tokens, (n_kv_heads, 1, head_dim) float32; it is zero if there are none."""
    if x.shape[1] == 0:
        return mx.zeros((x.shape[0], 1, x.shape[2]), mx.float32)
    return x.astype(mx.float32).mean(axis=1, keepdims=True)


def _encode(
    x: mx.array, first: int, order: mx.array, codec: Codec, mean: mx.array, metric: RoundingMetric | None
) -> Encoded:
    """Encode vectors of x (n_kv_heads, T, head_dim): those whose numbers, minus ``first``, are in ``order`` (.., E)."""
    if order.shape[1] and encoding_gpu.usable(codec, x.dtype, metric is not None):
        return encoding_gpu.encode(x, order + first, mean[:, 0], codec, metric)  # x whole: of a slice MLX makes a copy
    x = x[:, first:]
    parts, tile = [], ENCODE_TILE if on_cpu() else GPU_ENCODE_TILE
    for start in range(0, max(1, order.shape[1]), tile):
        some = mx.take_along_axis(x, order[:, start : start + tile, None], axis=1)
        part = codec.encode(some, mean, metric)
        mx.eval(part.codes, part.scales)
        parts.append(part)
    return parts[0] if len(parts) == 1 else Encoded.concatenate(parts)


def _encode_blocks(
    x: mx.array,
    order: mx.array,
    codec: TrellisCodec,
    mean: mx.array,
    metric: RoundingMetric | None,
    weights: mx.array | None,
) -> Encoded:
    """Encode vectors of x (n_kv_heads, T, head_dim): those that ``order`` (.., E) names. weights: (n_kv_heads, T)."""
    if order.shape[1] and trellis_search.usable(codec, x.dtype, metric is not None):
        return trellis_search.encode(x, order, mean[:, 0], codec, metric, weights)
    parts, tile = [], ENCODE_TILE if on_cpu() else GPU_ENCODE_TILE
    for start in range(0, max(1, order.shape[1]), tile):
        tokens = order[:, start : start + tile]
        some = mx.take_along_axis(x, tokens[..., None], axis=1)
        weight = None if weights is None else mx.take_along_axis(weights, tokens, axis=1)
        part = codec.encode(some, mean, metric, weight)
        mx.eval(part.codes, part.scales)
        parts.append(part)
    return parts[0] if len(parts) == 1 else Encoded.concatenate(parts)


def _to_16_bits(x: mx.array) -> mx.array:
    """Convert to 16-bit floats: bfloat16 stays, others become float16, and numbers too large for it its largest."""
    if x.dtype == mx.bfloat16:
        return mx.contiguous(x)
    return mx.contiguous(mx.clip(x, -65504.0, 65504.0).astype(mx.float16))
