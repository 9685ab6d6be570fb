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

from turboquant.codec import Encoded
from turboquant.layer import EncodedLayer, EncodedPart

TILE = 2048  # encoded tokens decoded at a time: bounds the memory of scores and decoded keys


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
    highest = parts[0].logsumexp
    for part in parts[1:]:
        highest = mx.maximum(highest, part.logsumexp)
    highest = mx.where(mx.isinf(highest), 0.0, highest)
    weights = [mx.exp(part.logsumexp - highest) for part in parts]
    total = sum(weights[1:], start=weights[0])
    output = sum(
        (w[..., None] * p.output for w, p in zip(weights[1:], parts[1:], strict=True)),
        start=weights[0][..., None] * parts[0].output,
    )
    return Partial(output / mx.maximum(total, 1e-37)[..., None], highest + mx.log(total))


def add_sink_logits(part: Partial, sinks: mx.array) -> Partial:
    """Let learned sink logits take their share of the softmax without adding to the output.

    sinks: broadcastable to ``part.logsumexp``.
    """
    total = mx.logaddexp(part.logsumexp, sinks.astype(mx.float32))
    return Partial(part.output * mx.exp(part.logsumexp - total)[..., None], total)


def attend_dense(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> Partial:
    """Attention over full-precision K/V.

    queries: (B, n_heads, L, head_dim); keys, values: (B, n_kv_heads, T, head_dim).
    mask: None, "causal" (the last query sees all T tokens), or boolean (B or 1, 1, L, T), true where visible.
    Returns a Partial of (B, n_heads, L, head_dim).
    """
    batch, n_heads, length, _ = queries.shape
    n_kv_heads, tokens = keys.shape[1], keys.shape[2]
    q = (queries.astype(mx.float32) * scale).reshape(batch, n_kv_heads, -1, length, queries.shape[-1])
    scores = q @ keys.astype(mx.float32)[:, :, None].swapaxes(-1, -2)
    if isinstance(mask, str):
        positions = mx.arange(tokens - length, tokens)
        mask = (mx.arange(tokens)[None] <= positions[:, None])[None, None]
    if mask is not None:
        scores = mx.where(mask[:, :, None], scores, -mx.inf)
    highest = scores.max(axis=-1, keepdims=True)
    highest = mx.where(mx.isinf(highest), 0.0, highest)
    weights = mx.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    output = (weights @ values.astype(mx.float32)[:, :, None]) / mx.maximum(total, 1e-37)
    logsumexp = (highest + mx.log(total)).squeeze(-1)
    return Partial(output.reshape(batch, n_heads, length, -1), logsumexp.reshape(batch, n_heads, length))


def attend_layer(queries: mx.array, layer: EncodedLayer, scale: float) -> Partial:
    """Attention of any number of queries over all tokens of an encoded layer, which every query may see.

    queries: (B, n_heads, L, head_dim). All B * L * (n_heads / n_kv_heads) queries of a KV head are one block, so
    that each tile is decoded once for all of them. Returns a Partial of (B, n_heads, L, value_dim).
    """
    block = fold_queries(queries.astype(mx.float32), layer.key_mean.shape[0])
    parts = [_attend_encoded(block * scale, part, layer) for part in layer.parts]
    if layer.sink_keys.shape[1]:
        part = attend_dense(block[None], layer.sink_keys[None], layer.sink_values[None], scale, None)
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
    for start in range(0, part.keys.tokens, TILE):
        earlier = [total, mean_share, output]
        keys = _after(part.keys.slice_tokens(start, start + TILE), earlier)
        values = _after(part.values.slice_tokens(start, start + TILE), earlier)
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
