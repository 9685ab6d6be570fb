"""Attention over full-precision and encoded K/V, in parts that are merged by their log-sum-exp.

This is the reference, in MLX operations that every backend has; ``kernels/`` holds faster equals. It knows tensors
only. A part is attention over some of the tokens; parts over disjoint tokens merge exactly, so a compressed prefix
and a full-precision suffix need never be put side by side. Encoded tokens are attended in the rotated basis: the
query is rotated once, scores are taken against levels, scales come in after the dot product (keys) and with the
probabilities (values), and the output is rotated back once.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Juravsky et al., "Hydragen"
(2024) for the shared prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from turboquant.quant.codec import Encoded
from turboquant.quant.layer import EncodedLayer, EncodedPart
from turboquant.runtime.device import fused

SCORES = 1 << 23  # held at a time, about: bounds the memory of scores and decoded keys
TILE = 2048  # tokens worked on at a time at least, however many the queries


@dataclass(frozen=True)
class Partial:
    """Softmax attention over some tokens.

    output: (..., head_dim) float32, normalised over those tokens.
    logsumexp: (...) float32, of their scores; -inf where all were masked.
    """

    output: mx.array
    logsumexp: mx.array


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over all tokens of the parts, each token being in one part only."""
    merged = parts[0]
    for part in parts[1:]:
        total = mx.logaddexp(merged.logsumexp, part.logsumexp)
        scales = merged.logsumexp[..., None], part.logsumexp[..., None], total[..., None]
        merged = Partial(_weighted_sum(merged.output, part.output, *scales), total)
    return merged


@fused
def _weighted_sum(one: mx.array, other: mx.array, of_one: mx.array, of_other: mx.array, total: mx.array) -> mx.array:
    finite = mx.where(mx.isinf(total), 0.0, total)
    return one * mx.exp(of_one - finite) + other * mx.exp(of_other - finite)


def add_sink_logits(part: Partial, sinks: mx.array) -> Partial:
    """Let learned sink logits take their share of the softmax without adding to the output.

    sinks: broadcastable to ``part.logsumexp``.
    """
    total = mx.logaddexp(part.logsumexp, sinks.astype(mx.float32))
    return Partial(part.output * mx.exp(part.logsumexp - total)[..., None], total)


def finish(part: Partial, sinks: mx.array | None, dtype: mx.Dtype) -> mx.array:
    """A part as a model wants it: learned sink logits (n_heads,) taken into its softmax, in the model's dtype."""
    if sinks is not None:
        part = add_sink_logits(part, sinks[None, :, None])
    return part.output.astype(dtype)


def attend_dense(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> Partial:
    """Attention over full-precision K/V.

    queries: (B, n_heads, L, head_dim); keys, values: (B, n_kv_heads, T, head_dim).
    mask: None, "causal" (the last query sees all T tokens), or boolean (B or 1, 1, L, T), true where visible.
    Returns a Partial of (B, n_heads, L, head_dim).
    """
    batch, n_heads, length, dim = queries.shape
    n_kv_heads, tokens = keys.shape[1], keys.shape[2]
    block = (queries.astype(mx.float32) * scale).reshape(batch, n_kv_heads, -1, dim)
    tile, parts = _tile(batch * n_heads * length), list[Partial]()
    for start in range(0, tokens, tile):
        some = slice(start, min(start + tile, tokens))
        k, v = keys[:, :, some], values[:, :, some]
        if parts:  # MLX is lazy, and would else hold the scores of all tiles
            block, k, v = mx.depends([block, k, v], [parts[-1].output])
        parts = [merge([*parts, _attend_tile(block, k, v, _visible(mask, length, tokens, some))])]
    part = parts[0]
    return Partial(part.output.reshape(batch, n_heads, length, -1), part.logsumexp.reshape(batch, n_heads, length))


def _tile(rows: int) -> int:
    """Tokens whose scores of so many queries are held at a time."""
    return max(TILE, SCORES // rows)


def _visible(mask: mx.array | str | None, length: int, tokens: int, some: slice) -> mx.array | None:
    """The mask over some of the tokens, (B or 1, 1, L, some), None where all are visible."""
    if not isinstance(mask, str):
        return None if mask is None else mask[..., some]
    first = tokens - length
    if some.stop <= first + 1:
        return None
    return (mx.arange(some.start, some.stop)[None] <= mx.arange(first, tokens)[:, None])[None, None]


def _attend_tile(block: mx.array, keys: mx.array, values: mx.array, visible: mx.array | None) -> Partial:
    """Attention of scaled queries (B, n_kv_heads, repeats * L, head_dim) over tokens whose scores fit in memory."""
    scores = block @ keys.astype(mx.float32).swapaxes(-1, -2)
    if visible is not None:
        grouped = scores.reshape(*scores.shape[:2], -1, *visible.shape[2:])
        scores = mx.where(visible[:, :, None], grouped, -mx.inf).reshape(scores.shape)
    logsumexp = mx.logsumexp(scores, axis=-1, keepdims=True)
    weights = _weights(scores, logsumexp)
    if values.dtype == mx.float16:  # as products in half precision are summed in single, and weights sum up to 1
        output = (weights.astype(mx.float16) @ values).astype(mx.float32)
    else:
        output = weights @ values.astype(mx.float32)
    return Partial(output, logsumexp.squeeze(-1))


@fused
def _weights(scores: mx.array, logsumexp: mx.array) -> mx.array:
    return mx.exp(scores - mx.where(mx.isinf(logsumexp), 0.0, logsumexp))


def attend_layer(queries: mx.array, layer: EncodedLayer, scale: float) -> Partial:
    """Attention of any number of queries over all tokens of an encoded layer, which every query may see.

    queries: (B, n_heads, L, head_dim). All B * L * (n_heads / n_kv_heads) queries of a KV head are one block, so
    that each tile is decoded once for all of them. Returns a Partial of (B, n_heads, L, value_dim).
    """
    block = fold_queries(queries.astype(mx.float32), layer.key_mean.shape[0])
    parts = [_attend_encoded(block * scale, part, layer) for part in layer.parts]
    if layer.sink_keys.shape[1]:
        part = attend_dense(block[None], layer.sink_keys[None], layer.sink_values.astype(mx.float32)[None], scale, None)
        parts.append(Partial(part.output[0], part.logsumexp[0]))
    return unfold_part(merge(parts), queries.shape)


def fold_queries(queries: mx.array, n_kv_heads: int) -> mx.array:
    """(B, n_heads, L, D) to one block of queries a KV head, (n_kv_heads, B * repeats * L, D)."""
    batch, _, length, dim = queries.shape
    grouped = queries.reshape(batch, n_kv_heads, -1, length, dim)
    return grouped.transpose(1, 0, 2, 3, 4).reshape(n_kv_heads, -1, dim)


def unfold_part(part: Partial, shape: tuple[int, ...]) -> Partial:
    """Undo ``fold_queries`` on a Partial for queries of ``shape``."""
    batch, n_heads, length, _ = shape
    n_kv_heads = part.output.shape[0]
    output = part.output.reshape(n_kv_heads, batch, -1, length, part.output.shape[-1])
    logsumexp = part.logsumexp.reshape(n_kv_heads, batch, -1, length)
    return Partial(
        output.transpose(1, 0, 2, 3, 4).reshape(batch, n_heads, length, -1),
        logsumexp.transpose(1, 0, 2, 3).reshape(batch, n_heads, length),
    )


def _attend_encoded(block: mx.array, part: EncodedPart, layer: EncodedLayer) -> Partial:
    """Attention of scaled queries (n_kv_heads, M, head_dim) over encoded tokens of a layer, tile by tile."""
    key_codec, value_codec = part.key_codec, part.value_codec
    rotated = key_codec.rotation.forward(block)
    mean_scores = block @ layer.key_mean.swapaxes(-1, -2)  # (n_kv_heads, M, 1): what removing the mean took away
    highest = mx.full((*block.shape[:2], 1), -mx.inf)
    total = mean_share = mx.zeros_like(highest)
    output = mx.zeros((*block.shape[:2], value_codec.head_dim))
    tile = _tile(block.shape[0] * max(block.shape[1:]))  # decoded keys are held, too
    for start in range(0, part.keys.tokens, tile):
        earlier = [total, mean_share, output]
        keys = _after(part.keys.slice_tokens(start, start + tile), earlier)
        values = _after(part.values.slice_tokens(start, start + tile), earlier)
        scores = rotated @ key_codec.decode_rotated(keys).swapaxes(-1, -2)
        scores = scores + mx.where((keys.scales > 0)[:, None], mean_scores, 0.0)
        new_highest = mx.maximum(highest, scores.max(axis=-1, keepdims=True))
        fade, weights = mx.exp(highest - new_highest), mx.exp(scores - new_highest)
        total = total * fade + weights.sum(axis=-1, keepdims=True)
        mean_share = mean_share * fade + (weights * (values.scales > 0)[:, None]).sum(axis=-1, keepdims=True)
        output = output * fade + weights @ value_codec.decode_rotated(values)
        highest = new_highest
    output = value_codec.rotation.inverse(output / total) + (mean_share / total) * layer.value_mean
    return Partial(output, (highest + mx.log(total)).squeeze(-1))


def _after(encoded: Encoded, earlier: list[mx.array]) -> Encoded:
    """Not to be touched before ``earlier`` is computed: MLX is lazy, and would else hold the scores of all tiles."""
    return Encoded(*mx.depends([encoded.codes, encoded.scales], earlier))
