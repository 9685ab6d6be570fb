"""Attention over full-precision and encoded K/V, in parts that are merged by their logsumexp.

This is the reference, written in MLX operations that every backend has; cpu.py and gpu.py compute the same faster.

A part is attention over some of the tokens. Parts over disjoint tokens merge exactly, so a compressed prefix and a
full-precision suffix need not be joined in memory. Attention to encoded tokens happens in the rotated basis: the query
is rotated once, scores are its products with levels, scales are applied after the product for keys and to the weights
for values, and the output is rotated back once.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Juravsky et al., "Hydragen"
(2024) for the shared prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from turboquant.quant.codec import Encoded
from turboquant.quant.layer import EncodedLayer, EncodedPart
from turboquant.quant.trellis import BLOCK
from turboquant.runtime.device import fused

SCORES = 1 << 23  # scores, and numbers of decoded keys, in memory at a time, about
LEAST = -1e30  # stands for the log-sum-exp of no tokens, from which nothing could be subtracted
TILE = 2048  # tokens in a tile, at least, however many queries there are; a tile has whole blocks of trellis codes


@dataclass(frozen=True)
class Partial:
    """The result of softmax attention over some tokens.

    output: (..., head_dim) float32, normalised over these tokens.
    logsumexp: (...) float32, of their scores; -inf if all of them were masked.
    """

    output: mx.array
    logsumexp: mx.array


def merge(parts: Sequence[Partial]) -> Partial:
    """Merge parts over disjoint tokens into attention over all of their tokens."""
    merged = parts[0]
    for part in parts[1:]:
        total = mx.logaddexp(merged.logsumexp, part.logsumexp)
        scales = merged.logsumexp[..., None], part.logsumexp[..., None], total[..., None]
        merged = Partial(_weighted_sum(merged.output, part.output, *scales), total)
    return merged


@fused
def _weighted_sum(a: mx.array, b: mx.array, a_logsumexp: mx.array, b_logsumexp: mx.array, total: mx.array) -> mx.array:
    finite = mx.maximum(total, LEAST)  # a test for infinity would be two more kernels that MLX compiles on CUDA
    return a * mx.exp(a_logsumexp - finite) + b * mx.exp(b_logsumexp - finite)


def add_sink_logits(part: Partial, sinks: mx.array) -> Partial:
    """Add learned sink logits to the softmax; they take a share of the weights and add nothing to the output.

    sinks: broadcastable to ``part.logsumexp``.
    """
    total = mx.logaddexp(part.logsumexp, sinks.astype(mx.float32))
    return Partial(part.output * mx.exp(part.logsumexp - total)[..., None], total)


def finish(part: Partial, sinks: mx.array | None, dtype: mx.Dtype) -> mx.array:
    """Return the output of a part in ``dtype``, after learned sink logits (n_heads,) are added to the softmax."""
    if sinks is not None:
        part = add_sink_logits(part, sinks[None, :, None])
    return part.output.astype(dtype)


def attend_dense(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> Partial:
    """Attention over full-precision K/V.

    queries: (B, n_heads, L, head_dim); keys, values: (B, n_kv_heads, T, head_dim).
    mask: None, "causal" (the last query sees all T tokens), or boolean (L, T) or (B or 1, 1, L, T), true for visible
        tokens.
    Returns a Partial of (B, n_heads, L, value_dim).
    """
    batch, n_heads, length, dim = queries.shape
    n_kv_heads, tokens = keys.shape[1], keys.shape[2]
    block = (queries.astype(mx.float32) * scale).reshape(batch, n_kv_heads, -1, dim)
    tile, parts = _tile(batch * n_heads * length), list[Partial]()
    for start in range(0, tokens, tile):
        some = slice(start, min(start + tile, tokens))
        k, v = keys[:, :, some], values[:, :, some]
        if parts:  # without this, lazy evaluation would hold the scores of all tiles at once
            block, k, v = mx.depends([block, k, v], [parts[-1].output])
        parts = [merge([*parts, _attend_tile(block, k, v, _visible(mask, length, tokens, some))])]
    part = parts[0]
    return Partial(part.output.reshape(batch, n_heads, length, -1), part.logsumexp.reshape(batch, n_heads, length))


def _tile(rows: int) -> int:
    """Return how many tokens a tile has for this number of queries."""
    return max(TILE, SCORES // rows // BLOCK * BLOCK)


def _visible(mask: mx.array | str | None, length: int, tokens: int, some: slice) -> mx.array | None:
    """Return the mask of some of the tokens, (B or 1, 1, L, some), or None if all of them are visible."""
    if not isinstance(mask, str):
        return None if mask is None else of_four_axes(mask)[..., some]
    first = tokens - length
    if some.stop <= first + 1:
        return None
    return (mx.arange(some.start, some.stop)[None] <= mx.arange(first, tokens)[:, None])[None, None]


def of_four_axes(mask: mx.array) -> mx.array:
    """Return a mask (L, T), as mlx-lm's caches make them, or (B or 1, 1, L, T) with four axes."""
    return mask[None, None] if mask.ndim == 2 else mask


def _attend_tile(block: mx.array, keys: mx.array, values: mx.array, visible: mx.array | None) -> Partial:
    """Attention of scaled queries (B, n_kv_heads, repeats * L, head_dim) over the tokens of one tile."""
    scores = block @ keys.astype(mx.float32).swapaxes(-1, -2)
    if visible is not None:
        grouped = scores.reshape(*scores.shape[:2], -1, *visible.shape[2:])
        scores = mx.where(visible[:, :, None], grouped, -mx.inf).reshape(scores.shape)
    logsumexp = mx.logsumexp(scores, axis=-1, keepdims=True)
    weights = _weights(scores, logsumexp)
    if values.dtype == mx.float16:  # precise enough: weights sum up to 1, and products are summed in float32
        output = (weights.astype(mx.float16) @ values).astype(mx.float32)
    else:
        output = weights @ values.astype(mx.float32)
    return Partial(output, logsumexp.squeeze(-1))


@fused
def _weights(scores: mx.array, logsumexp: mx.array) -> mx.array:
    return mx.exp(scores - mx.maximum(logsumexp, LEAST))


def attend_layer(queries: mx.array, layer: EncodedLayer, scale: float) -> Partial:
    """Attention of any number of queries over an encoded layer; every query sees all of its tokens.

    queries: (B, n_heads, L, head_dim). All B * L * (n_heads / n_kv_heads) queries of a KV head are one block, so that
    each tile is decoded once for all of them.
    Returns a Partial of (B, n_heads, L, value_dim).
    """
    block = fold_queries(queries.astype(mx.float32), layer.key_mean.shape[0])
    parts = [_attend_encoded(block * scale, part, layer) for part in layer.parts]
    if layer.sink_keys.shape[1]:
        part = attend_dense(block[None], layer.sink_keys[None], layer.sink_values.astype(mx.float32)[None], scale, None)
        parts.append(Partial(part.output[0], part.logsumexp[0]))
    return unfold_part(merge(parts), queries.shape)


def fold_queries(queries: mx.array, n_kv_heads: int) -> mx.array:
    """Rearrange (B, n_heads, L, D) into one block of queries for each KV head, (n_kv_heads, B * repeats * L, D)."""
    batch, _, length, dim = queries.shape
    grouped = queries.reshape(batch, n_kv_heads, -1, length, dim)
    return grouped.transpose(1, 0, 2, 3, 4).reshape(n_kv_heads, -1, dim)


def unfold_part(part: Partial, shape: tuple[int, ...]) -> Partial:
    """Rearrange a Partial of folded queries as the queries were, whose shape was ``shape``."""
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
    # (n_kv_heads, M, 1), for the keys whose mean was subtracted.
    mean_scores = block @ layer.key_mean.swapaxes(-1, -2)
    highest = mx.full((*block.shape[:2], 1), -mx.inf)
    total = mean_share = mx.zeros_like(highest)
    output = mx.zeros((*block.shape[:2], value_codec.head_dim))
    tile = _tile(block.shape[0] * max(block.shape[1:]))  # the decoded keys of a tile must fit, too
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
    """Make MLX compute ``earlier`` before it uses ``encoded``; else it would hold the scores of all tiles at once."""
    return Encoded(*mx.depends([encoded.codes, encoded.scales], earlier))
