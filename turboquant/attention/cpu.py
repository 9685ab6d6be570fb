"""Attention on a CPU: NumPy and its BLAS on zero-copy views of MLX arrays.

MLX computes exponentials on a CPU twenty times slower than NumPy does, and they are what attention there waits for.
The functions are equals of those of the same name in ``attention/reference.py``, which defines what they compute. They
evaluate their inputs, so they suit a CPU, where nothing is gained by queueing, and nothing else. Views are read,
never written to.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.attention.reference import Partial, fold_queries, unfold_part
from turboquant.quant.codebook import lloyd_max
from turboquant.quant.codec import Codec
from turboquant.quant.layer import EncodedLayer
from turboquant.quant.packing import PLANES
from turboquant.runtime.threads import run_in_parallel

Floats = NDArray[np.floating[Any]]  # float32 throughout; NumPy's stubs lose track of it
BLOCK = 1 << 17  # elements of scores, and of decoded keys, worked on at a time: about a core's cache
FEW = 1 << 16  # scores that are worked on at once, for all rows and heads, since sharing them out would take longer
ROWS = 256  # queries worked on at a time: enough for the BLAS, few enough to skip most of what a causal mask hides


def attend_dense(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> Partial:
    """See ``reference.attend_dense``."""
    batch, n_heads, length, dim = queries.shape
    n_kv_heads, tokens = keys.shape[1], keys.shape[2]
    repeats = n_heads // n_kv_heads
    q = (_view(queries) * np.float32(scale)).reshape(batch, n_kv_heads, repeats, length, dim)
    k, v = _view(keys), _view(values)
    visible = None if mask is None or isinstance(mask, str) else np.asarray(mask)[:, :, None]
    softmax = OnlineSoftmax((batch, n_kv_heads, repeats, length), values.shape[-1])
    rows = max(1, min(length, ROWS // repeats))
    tile = max(64, BLOCK // (rows * repeats))

    def attend_group(group: tuple[slice, slice]) -> None:
        b, h = group
        for start, top in itertools.product(range(0, tokens, tile), range(0, length, rows)):
            stop, bottom = min(start + tile, tokens), min(top + rows, length)
            first = tokens - length + top  # the position of the first of these queries, where the mask is causal
            if mask == "causal":
                stop = min(stop, first + bottom - top)
            if stop <= start:
                continue
            index = (b, h, slice(None), slice(top, bottom))
            scores = _multiply(q[index], k[b, h, start:stop].swapaxes(-1, -2))
            if visible is not None:
                row = b if visible.shape[0] > 1 else slice(None)
                scores = np.where(visible[row, :, :, top:bottom, start:stop], scores, np.float32(-np.inf))
            elif mask == "causal" and stop > first + 1:
                scores[..., np.arange(start, stop) > np.arange(first, first + bottom - top)[:, None]] = -np.inf
            weights, fade = softmax.weigh(scores, index)
            softmax.add(index, fade, _multiply(weights, v[b, h, start:stop]))

    if batch * n_heads * length * tokens <= FEW:
        attend_group((slice(None), slice(None)))
    else:
        each = [(slice(b, b + 1), slice(h, h + 1)) for b in range(batch) for h in range(n_kv_heads)]
        run_in_parallel(attend_group, each)
    output, logsumexp = softmax.finish()
    shape = (batch, n_heads, length)
    return Partial(mx.array(output.reshape(*shape, -1)), mx.array(logsumexp.reshape(shape)))


def attend_layer(queries: mx.array, layer: EncodedLayer, scale: float) -> Partial:
    """See ``attention.attend_layer``."""
    block = fold_queries(queries.astype(mx.float32) * scale, layer.key_mean.shape[0])
    n_kv_heads, rows, _ = block.shape
    softmax = OnlineSoftmax((n_kv_heads, rows), layer.value_mean.shape[-1])
    rotated = _view(layer.key_codec.rotation.forward(block))
    block_view = _view(block)
    mean_scores = block_view @ _view(layer.key_mean).swapaxes(-1, -2)
    mean_share = np.zeros((n_kv_heads, rows, 1), np.float32)
    index = (slice(None),)
    tile = max(64, BLOCK // (n_kv_heads * max(rows, layer.key_mean.shape[-1])))
    for part in layer.parts:
        key_codes, value_codes = np.asarray(part.keys.codes), np.asarray(part.values.codes)
        key_scales, value_scales = _view(part.keys.scales)[:, None], _view(part.values.scales)[:, None]
        key_factors, value_factors = np.abs(key_scales), np.abs(value_scales)
        key_centred, value_centred = (key_scales > 0).astype(np.float32), (value_scales > 0).astype(np.float32)
        for start in range(0, part.keys.tokens, tile):
            some = slice(start, start + tile)
            scores = rotated @ decode_levels(key_codes[:, some], part.key_codec).swapaxes(-1, -2)
            scores *= key_factors[..., some]
            scores += mean_scores * key_centred[..., some]
            weights, fade = softmax.weigh(scores, index)
            mean_share *= fade
            mean_share += weights @ value_centred[..., some].swapaxes(-1, -2)
            weights *= value_factors[..., some]
            softmax.add(index, fade, weights @ decode_levels(value_codes[:, some], part.value_codec))
    # What was summed so far lies in the rotated basis; the tokens kept as they are do not.
    softmax.output = _view(layer.value_codec.rotation.inverse(mx.array(softmax.output))).copy()
    softmax.output += mean_share * _view(layer.value_mean)
    if layer.sink_keys.shape[1]:
        weights, fade = softmax.weigh(block_view @ _view(layer.sink_keys).swapaxes(-1, -2), index)
        softmax.add(index, fade, weights @ _view(layer.sink_values))
    output, logsumexp = softmax.finish()
    return unfold_part(Partial(mx.array(output), mx.array(logsumexp)), queries.shape)


class OnlineSoftmax:
    """The running maximum, sum and output of softmax attention over tiles of tokens.

    shape: that of the queries without head_dim; ``output`` has value_dim behind it, and is not normalised.
    """

    def __init__(self, shape: tuple[int, ...], value_dim: int) -> None:
        self.highest: Floats = np.full((*shape, 1), -np.inf, np.float32)
        self.total: Floats = np.zeros((*shape, 1), np.float32)
        self.output: Floats = np.zeros((*shape, value_dim), np.float32)

    def weigh(self, scores: Floats, index: tuple[Any, ...]) -> tuple[Floats, Floats]:
        """Turn a tile's scores into weights, in place; returns them and what earlier tiles must be multiplied by."""
        highest = np.maximum(self.highest[index], scores.max(axis=-1, keepdims=True))
        finite = np.where(np.isinf(highest), np.float32(0), highest)
        scores -= finite
        weights = np.exp(scores, out=scores)
        fade = np.exp(self.highest[index] - finite)
        self.highest[index] = highest
        self.total[index] = self.total[index] * fade + weights.sum(axis=-1, keepdims=True)
        return weights, fade

    def add(self, index: tuple[Any, ...], fade: Floats, output: Floats) -> None:
        """Add a tile's weighted values."""
        self.output[index] = self.output[index] * fade + output

    def finish(self) -> tuple[Floats, Floats]:
        """The normalised output and the log-sum-exp, without the last axis of 1."""
        with np.errstate(divide="ignore"):
            logsumexp: Floats = (self.highest + np.log(self.total)).squeeze(-1)
        output: Floats = self.output / np.maximum(self.total, np.float32(1e-37))
        return output, logsumexp


def decode_levels(words: NDArray[np.uint32], codec: Codec) -> Floats:
    """The levels behind packed codes (..., words): (..., head_dim) float32, scales not applied.

    A few coordinates at a time are looked up in one table: those that share a byte of the plane of low bits, with
    the bits of theirs from the other plane beside them.
    """
    planes, dim = PLANES[codec.bits], codec.head_dim
    table = _table(codec.bits)
    low_words = -(-dim * planes[0] // 32)
    index = words[..., :low_words].view(np.uint8)
    if len(planes) > 1:
        high = words[..., low_words:].view(np.uint8)
        width = planes[1] * (8 // planes[0])  # bits that belong to one byte of the low plane
        parts = [(high >> np.uint8(shift)) & np.uint8(2**width - 1) for shift in range(0, 8, width)]
        spread = np.stack(parts, axis=-1).reshape(*high.shape[:-1], -1)[..., : index.shape[-1]]
        index = index.astype(np.uint16) | (spread.astype(np.uint16) << np.uint16(8))
    levels: Floats = np.take(table, index, axis=0)
    return levels.reshape(*words.shape[:-1], -1)[..., :dim]


@functools.cache
def _table(bits: int) -> Floats:
    """Levels of the coordinates that one byte of the low plane holds, by that byte and the high bits above it."""
    planes = PLANES[bits]
    count = 8 // planes[0]
    high_width = planes[1] if len(planes) > 1 else 0
    entries = np.arange(2 ** (8 + count * high_width))
    columns = []
    for i in range(count):
        low = (entries >> (i * planes[0])) & (2 ** planes[0] - 1)
        high = (entries >> (8 + i * high_width)) & (2**high_width - 1)
        columns.append(lloyd_max(bits).levels[low | (high << planes[0])])
    return np.stack(columns, axis=-1)


def _multiply(x: Floats, y: Floats) -> Floats:
    """x (B, H, repeats, L, M) times y (B, H, M, N), as one product for all repeats."""
    product: Floats = x.reshape(*x.shape[:2], -1, x.shape[-1]) @ y
    return product.reshape(*x.shape[:-1], y.shape[-1])


def _view(x: mx.array) -> Floats:
    """A float32 NumPy view, without a copy where x is float32 already."""
    return np.asarray(x if x.dtype == mx.float32 else x.astype(mx.float32))
