"""Attention on a CPU: NumPy and its BLAS on zero-copy views of MLX arrays.

On a CPU, MLX computes exponentials twenty times slower than NumPy, and they take most of the time of attention. The
functions compute the same as those with the same names in attention/reference.py. They evaluate their inputs at once,
which costs nothing on a CPU. They never write to a view of an MLX array.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.attention.reference import Partial, fold_queries, of_four_axes, unfold_part
from turboquant.quant import trellis
from turboquant.quant.codebook import lloyd_max
from turboquant.quant.codec import Codec
from turboquant.quant.layer import EncodedLayer
from turboquant.quant.packing import PLANES
from turboquant.quant.trellis import TrellisCodec
from turboquant.runtime.threads import multiplies_uncopied, run_in_parallel

Floats = NDArray[np.floating[Any]]  # always float32, which NumPy's type stubs cannot follow
BLOCK = 1 << 17  # scores, and numbers of decoded keys, in memory at a time: about the size of a core's cache
SMALL = 1_000_000  # multiplications in the largest product that OpenBLAS computes without copies of its factors
FEW = 1 << 16  # up to this many scores, one thread does all rows and heads, because starting more takes longer
LARGEST = 60  # exponentials of scores from -LARGEST to LARGEST, and their sums, need no shift
ROWS = 256  # queries at a time: enough for the BLAS, and few enough to skip most of what a causal mask hides


def attend_dense(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> Partial:
    """Compute the same as ``reference.attend_dense``."""
    batch, n_heads, length, dim = queries.shape
    n_kv_heads, tokens = keys.shape[1], keys.shape[2]
    repeats = n_heads // n_kv_heads
    q = (_view(queries) * np.float32(scale)).reshape(batch, n_kv_heads, repeats, length, dim)
    k, v = _view(keys), _view(values)
    visible = None if mask is None or isinstance(mask, str) else np.asarray(of_four_axes(mask))[:, :, None]
    softmax = OnlineSoftmax((batch, n_kv_heads, repeats, length), values.shape[-1])
    rows = -(-length // -(-length * repeats // ROWS))
    tile, is_long = max(64, BLOCK // (rows * repeats)), length > rows

    def attend_group(group: tuple[slice, slice]) -> None:
        centred = softmax.centre(q[group], k[group], group) if mask == "causal" and is_long else None
        group_keys, weigh = (k[group], softmax.weigh) if centred is None else (centred, softmax.weigh_bounded)
        for start in range(0, tokens, tile):
            columns = group_keys[..., start : start + tile, :].swapaxes(-1, -2)
            if is_long:
                columns = np.ascontiguousarray(columns)
            for top in range(0, length, rows):
                stop, bottom = min(start + tile, tokens), min(top + rows, length)
                first = tokens - length + top  # the position of the first of these queries, where the mask is causal
                if mask == "causal":
                    stop = min(stop, first + bottom - top)
                if stop <= start:
                    continue
                index = (*group, slice(None), slice(top, bottom))
                scores = _multiply_groups(q[index], columns[..., : stop - start], is_long)
                if visible is not None:
                    row = group[0] if visible.shape[0] > 1 else slice(None)
                    np.copyto(scores, -np.inf, where=~visible[row, :, :, top:bottom, start:stop])
                elif mask == "causal":
                    _hide_later(scores, first, start)
                weights, fade = weigh(scores, index)
                softmax.add(index, fade, _multiply_groups(weights, v[(*group, slice(start, stop))], is_long))

    if batch * n_heads * length * tokens <= FEW:
        attend_group((slice(None), slice(None)))
    else:
        each = [(slice(b, b + 1), slice(h, h + 1)) for b in range(batch) for h in range(n_kv_heads)]
        run_in_parallel(attend_group, each)
    output, logsumexp = softmax.finish()
    shape = (batch, n_heads, length)
    return Partial(mx.array(output.reshape(*shape, -1)), mx.array(logsumexp.reshape(shape)))


def attend_layer(queries: mx.array, layer: EncodedLayer, scale: float) -> Partial:
    """Compute the same as ``reference.attend_layer``."""
    block = fold_queries(queries.astype(mx.float32) * scale, layer.key_mean.shape[0])
    n_kv_heads, rows, _ = block.shape
    softmax = OnlineSoftmax((n_kv_heads, rows), layer.value_mean.shape[-1])
    rotated = _view(layer.key_codec.rotation.forward(block))
    block_view = _view(block)
    mean_scores = multiply(block_view, _view(layer.key_mean).swapaxes(-1, -2))
    mean_share = np.zeros((n_kv_heads, rows, 1), np.float32)
    index = (slice(None),)
    tile = BLOCK // (n_kv_heads * max(rows, layer.key_mean.shape[-1]))
    tile = max(1, tile // trellis.BLOCK) * trellis.BLOCK  # whole blocks of trellis codes
    for part in layer.parts:
        key_codes, value_codes = np.asarray(part.keys.codes), np.asarray(part.values.codes)
        key_scales, value_scales = _view(part.keys.scales)[:, None], _view(part.values.scales)[:, None]
        key_factors, value_factors = np.abs(key_scales), np.abs(value_scales)
        key_centred, value_centred = (key_scales > 0).astype(np.float32), (value_scales > 0).astype(np.float32)
        for start in range(0, part.keys.tokens, tile):
            some = slice(start, start + tile)
            scores = multiply(rotated, decode_levels(key_codes[:, some], part.key_codec).swapaxes(-1, -2))
            scores *= key_factors[..., some]
            scores += mean_scores * key_centred[..., some]
            weights, fade = softmax.weigh(scores, index)
            mean_share *= fade
            mean_share += multiply(weights, value_centred[..., some].swapaxes(-1, -2))
            weights *= value_factors[..., some]
            softmax.add(index, fade, multiply(weights, decode_levels(value_codes[:, some], part.value_codec)))
    # The sum so far is in the rotated basis. The sinks, which come next, are not.
    softmax.output = _view(layer.value_codec.rotation.inverse(mx.array(softmax.output))).copy()
    softmax.output += mean_share * _view(layer.value_mean)
    if layer.sink_keys.shape[1]:
        weights, fade = softmax.weigh(multiply(block_view, _view(layer.sink_keys).swapaxes(-1, -2)), index)
        softmax.add(index, fade, multiply(weights, _view(layer.sink_values)))
    output, logsumexp = softmax.finish()
    return unfold_part(Partial(mx.array(output), mx.array(logsumexp)), queries.shape)


class OnlineSoftmax:
    """The running maximum, sum and output of softmax attention over tiles of tokens.

    shape: of the queries without head_dim. ``output`` has the shape (*shape, value_dim) and is not normalised.
    """

    def __init__(self, shape: tuple[int, ...], value_dim: int) -> None:
        self.highest: Floats = np.full((*shape, 1), -np.inf, np.float32)
        self.total: Floats = np.zeros((*shape, 1), np.float32)
        self.output: Floats = np.zeros((*shape, value_dim), np.float32)

    def centre(self, queries: Floats, keys: Floats, index: tuple[Any, ...]) -> Floats | None:
        """Subtract the mean of keys (..., T, dim), which changes a query's scores (..., repeats, L) alike.

        Returns the keys if no score with them can be so large that its exponential needs a shift, else None. The
        shift by the mean's score takes the place of the highest score.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # of numbers that are too large for the bound, too
            mean = keys.mean(axis=-2, keepdims=True)
            centred: Floats = keys - mean
            norms = (np.sqrt(np.einsum("...d,...d->...", x, x).max()) for x in (queries, centred))
            if not math.prod(norms) < LARGEST:
                return None
        self.highest[index] = multiply(queries, mean[..., None, :, :].swapaxes(-1, -2))
        return centred

    def weigh(self, scores: Floats, index: tuple[Any, ...]) -> tuple[Floats, Floats]:
        """Turn a tile's scores into weights, in place; return them and the factor for the output of earlier tiles."""
        highest = np.maximum(self.highest[index], scores.max(axis=-1, keepdims=True))
        finite = np.where(np.isinf(highest), np.float32(0), highest)
        scores -= finite
        fade = np.exp(self.highest[index] - finite)
        self.highest[index] = highest
        total = self.total[index]
        total *= fade
        return self.weigh_bounded(scores, index)[0], fade

    def weigh_bounded(self, scores: Floats, index: tuple[Any, ...]) -> tuple[Floats, None]:
        """Turn scores with the keys of ``centre`` into weights, in place; return them, and None for a factor of 1."""
        weights = np.exp(scores, out=scores)
        total = self.total[index]
        total += multiply(weights, np.ones((weights.shape[-1], 1), np.float32))  # faster than NumPy's sum
        return weights, None

    def add(self, index: tuple[Any, ...], fade: Floats | None, output: Floats) -> None:
        """Multiply the output by ``fade``, if it is not None, and add a tile's weighted values to it."""
        earlier = self.output[index]
        if fade is not None:
            earlier *= fade
        earlier += output

    def finish(self) -> tuple[Floats, Floats]:
        """Return the normalised output (*shape, value_dim) and the logsumexp (*shape)."""
        with np.errstate(divide="ignore"):
            logsumexp: Floats = (self.highest + np.log(self.total)).squeeze(-1)
        output: Floats = self.output / np.maximum(self.total, np.float32(1e-37))
        return output, logsumexp


def decode_levels(words: NDArray[np.uint32], codec: Codec) -> Floats:
    """Decode packed codes (H, T, words) to levels (H, T, head_dim) float32, without applying scales.

    The coordinates that share a byte of the plane of low bits are looked up together in one table. The index is this
    byte and, above it, their bits from the other plane.
    """
    if isinstance(codec, TrellisCodec):
        decoded: Floats = codec.decode_levels(np, words)
        return decoded
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
    """Return the levels of the coordinates that share a byte of the low plane, by this byte and the high bits above."""
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


def multiply(x: Floats, y: Floats, output: Floats | None = None) -> Floats:
    """Multiply matrices, into ``output`` if it is given, without NumPy's warning of invalid values.

    Some kernels of OpenBLAS set the processor flag for an invalid operation although all numbers are finite, and NumPy
    then warns (numpy issue 24067). Keys and values that are not finite are found when a prefix is encoded.
    """
    with np.errstate(invalid="ignore"):
        product: Floats = np.matmul(x, y, out=output)
    return product


def _hide_later(scores: Floats, first: int, start: int) -> None:
    """Mask the scores (..., L, N) of queries at ``first`` and on, of the tokens at ``start`` and on that are later."""
    length, tokens = scores.shape[-2:]
    skipped = max(0, first + 1 - start)  # tokens that all of these queries see
    if skipped < tokens:
        hidden = np.arange(start + skipped, start + tokens) > np.arange(first, first + length)[:, None]
        np.copyto(scores[..., skipped:], -np.inf, where=hidden)


def _multiply_groups(x: Floats, y: Floats, is_long: bool) -> Floats:
    """Multiply x (B, H, repeats, L, M) by y (B, H, M, N), in products for all repeats.

    Where ``is_long``, and OpenBLAS has kernels that multiply small matrices without copies of them, some rows of ``x``
    are multiplied at a time. The rows of ``y`` are contiguous then.
    """
    flat = x.reshape(*x.shape[:2], -1, x.shape[-1])
    rows, (inner, columns) = flat.shape[2], y.shape[2:]
    together = SMALL // (inner * columns) // 4 * 4  # the kernels take four rows at a time
    if not is_long or not 4 < together < rows or not multiplies_uncopied():
        return multiply(flat, y).reshape(*x.shape[:-1], columns)
    product, whole = np.empty((*flat.shape[:3], columns), np.float32), rows // together * together
    blocks = product[:, :, :whole].reshape(*x.shape[:2], -1, together, columns)
    multiply(flat[:, :, :whole].reshape(*x.shape[:2], -1, together, inner), y[:, :, None], blocks)
    multiply(flat[:, :, whole:], y, product[:, :, whole:])
    return product.reshape(*x.shape[:-1], columns)


def _view(x: mx.array) -> Floats:
    """Return x as a float32 NumPy array; it is a view without a copy if x is float32."""
    return np.asarray(x if x.dtype == mx.float32 else x.astype(mx.float32))
