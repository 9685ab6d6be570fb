"""Compress keys and values by trellis codes on a GPU, with two kernels, written once for CUDA and Metal.

They compute the same as ``TrellisCodec.encode``. The first, ``units.h`` in ``text/``, centres, rotates and normalises
vectors. The second, ``search.h`` with ``viterbi.h`` and ``products.h``, does all that NumPy does on a CPU: it finds the
strings of all coordinates, rounds in a metric, and packs. A SIMD-group works on 256 numbers of a coordinate of keys at
a time, or on 128 of values.
"""

from __future__ import annotations

import functools
import math

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.kernels.kernel_text import Launch
from turboquant.kernels.launch import gpu, launch, runs
from turboquant.kernels.programs import Variant, variant_of
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.codec import Encoded, signed_scales
from turboquant.quant.rounding import RoundingMetric
from turboquant.quant.trellis import BLOCK, CODES, PAIRS, SWEEPS, TrellisCodec, relative_to_blocks
from turboquant.quant.viterbi import BINS, NODE_BITS, REACH, WINDOW, TrellisCode, rotated
from turboquant.runtime.device import on_cpu

HEAD_DIMS = (64, 128, 256)  # of units.h
THREADS = 128  # of units.h
NODES, LANES = 1 << NODE_BITS, 1 << (NODE_BITS - 1)  # a lane holds the costs of two nodes
STEP = PAIRS // 2  # coordinates whose errors move each other one by one
AT_ONCE = 2  # times 16 coordinates whose errors are read before they are multiplied
AHEAD = 3  # records that are read beyond a string's end
TABLES = ("table", "level_pairs", "masks", "row_of_bin", "sizes")
METRIC = ("feedback", "pull", "damped")
MOST_DISAGREEMENT = 0.05  # share of levels that may differ from NumPy's, or of the error in a metric
_TRIED = 3 * BLOCK  # tokens


def usable(codec: TrellisCodec, dtype: mx.Dtype, in_metric: bool) -> bool:
    """Return whether there is a GPU, and its kernels agree with ``TrellisCodec.encode`` on a CPU."""
    return not on_cpu() and _runs(codec, dtype, in_metric)


def encode(
    x: mx.array,
    order: mx.array,
    mean: mx.array,
    codec: TrellisCodec,
    metric: RoundingMetric | None,
    weights: mx.array | None,
) -> Encoded:
    """Compress vectors of x (H, T, head_dim), those that ``order`` (H, N) int32 names; ``BLOCK`` divides N.

    mean: (H, head_dim) float32. metric, weights (H, T): see ``TrellisCodec.encode``.
    """
    if codec.head_dim not in HEAD_DIMS:
        some = mx.take_along_axis(x, order[..., None], axis=1)
        of_some = None if weights is None else mx.take_along_axis(weights, order, axis=1)
        return codec.encode(some, mean[:, None], metric, of_some, choose)
    unit, norms, roots = units(x, order, mean, codec, weights)
    words, factors = choose(codec, unit, relative_to_blocks(roots), metric)
    return Encoded(words, signed_scales(mx.abs(norms) * factors, norms > 0))


def units(
    x: mx.array, order: mx.array, mean: mx.array, codec: TrellisCodec, weights: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Centre, rotate and normalise vectors, see ``encode``.

    Returns them, (H, head_dim, N) float16; their norms (H, N), negative where the mean was not subtracted; and the
    norms times the roots of their weights.
    """
    what = _units_launch(codec, weights is not None, *order.shape)
    inputs = [x, mx.contiguous(order), mx.contiguous(mean), codec.rotation.signs]
    unit, norms, roots = launch(what, inputs if weights is None else [*inputs, mx.contiguous(weights)])
    return unit, norms, roots


def choose(
    codec: TrellisCodec, unit: mx.array, root: mx.array, metric: RoundingMetric | None
) -> tuple[mx.array, mx.array]:
    """Do what ``TrellisCodec.choose`` does: unit (H, dim, T), root (H, T); returns words (H, T, words) and factors."""
    heads, dim, tokens = unit.shape
    what = _search_launch(codec, metric is not None, heads, tokens)
    inputs = [unit.astype(mx.float16), root, *_tables(codec.bits), _sizes(tokens)]
    if metric is not None:
        inputs += [mx.array(x).astype(mx.float16) for x in (metric.factor, metric.pull, metric.damped)]
    words, factors, *_ = launch(what, inputs)
    return words, factors if metric is not None else mx.sqrt(dim / factors.sum(axis=1))


def variants(codec: CacheCodec, dim: int, dtype: mx.Dtype) -> list[Variant | None]:
    """Return the kernels that encode a model's layers on CUDA, for keys and values of ``dtype``."""
    kinds = {"unit": (mx.float16, 3), "root": (mx.float32, 2)} | dict.fromkeys(METRIC, (mx.float16, 3))
    kinds |= {"table": (mx.float32, 2), "level_pairs": (mx.uint32, 3), "masks": (mx.uint32, 2)}
    kinds |= {"row_of_bin": (mx.uint8, 2), "sizes": (mx.int32, 1), "x": (dtype, 3), "order": (mx.int32, 2)}
    kinds |= {"mean": (mx.float32, 2), "signs": (mx.float32, 1), "weights": (mx.float32, 2)}
    found = []
    for own, in_metric in ((codec.keys(dim), codec.query_aware), (codec.values(dim), False)):
        if isinstance(own, TrellisCodec):
            found.append(_search_launch(own, in_metric, 1, BLOCK))
            found += [_units_launch(own, True, 1, BLOCK)] if dim in HEAD_DIMS else []
    unique = {(what.name, what.constants): what for what in found}
    return [variant_of(what, [kinds[name] for name in what.inputs]) for what in unique.values()]


def _units_launch(codec: TrellisCodec, weighted: bool, heads: int, count: int) -> Launch:
    dim = codec.head_dim
    return Launch(
        "units",
        (("DIM", dim), ("RUN", dim // 8), ("ROOT", dim**-0.5), ("THREADS", THREADS), ("WEIGHTED", int(weighted))),
        ("x", "order", "mean", "signs", *(("weights",) if weighted else ())),
        (
            ("units", (heads, dim, count), mx.float16),
            ("norms", (heads, count), mx.float32),
            ("roots", (heads, count), mx.float32),
        ),
        (-(-count // (THREADS // 4)), heads, 1),
        THREADS,
        ("rotation.h",),
        strided=True,
    )


def _search_launch(codec: TrellisCodec, in_metric: bool, heads: int, tokens: int) -> Launch:
    keys, blocks, dim = codec.of == "keys", tokens // BLOCK, codec.head_dim
    coordinates = dim if in_metric else PAIRS if keys else STEP
    parts, warps = dim // coordinates, 1 if in_metric else 4 if gpu() == "cuda" else 2
    outputs = [
        ("words", (heads, tokens, codec.words), mx.uint32),
        ("factors", (heads, tokens) if in_metric else (heads, parts, tokens), mx.float32),
    ]
    return Launch(
        "search",
        _defined(codec, in_metric, coordinates, warps),
        ("unit", "root", *TABLES, *(METRIC if in_metric else ())),
        tuple(outputs + ([("errors", (heads, dim, tokens), mx.float16)] if in_metric else [])),
        (-(-blocks // (warps * (2 if keys else 1))), heads * parts, 1),
        32 * warps,
        ("viterbi.h", "products.h"),
    )


def _defined(codec: TrellisCodec, in_metric: bool, coordinates: int, warps: int) -> tuple[tuple[str, int | float], ...]:
    """Return the constants that are compiled into the kernel; sizes of shared arrays are in words."""
    bits, keys = codec.bits, codec.of == "keys"
    length = BLOCK if keys else BLOCK // 2
    rows = 1 << bits
    period, codes = NODE_BITS // math.gcd(NODE_BITS, bits), 1 if keys else 2
    records = length + (length + AHEAD) // 16 + AHEAD
    return (
        ("BITS", bits),
        ("DIM", codec.head_dim),
        ("KEYS", int(keys)),
        ("METRIC", int(in_metric)),
        ("SWEEPS", SWEEPS),
        ("COORDINATES", coordinates),
        ("STEP", STEP),
        ("BLOCK", BLOCK),
        ("LENGTH", length),
        ("WARPS", warps),
        ("NODE_BITS", NODE_BITS),
        ("NODES", NODES),
        ("LANES", LANES),
        ("ROWS", rows),
        ("PERIOD", period),
        ("WINDOW", WINDOW),
        ("AHEAD", AHEAD),
        ("BINS", BINS),
        ("REACH", REACH),
        ("AT_ONCE", AT_ONCE),
        ("RECORDS", records),
        ("LEVEL_WORDS", period * rows * 32),
        ("MASK_WORDS", period * (rows - 1)),
        ("STATE_WORDS", codes * rows * NODES),
        ("CHANGE_WORDS", STEP * length if in_metric else 1),
        ("PULL_WORDS", STEP * STEP if in_metric else 1),
        ("END_WORDS", codec.head_dim // 2 if in_metric else 1),
        ("SCALE_WORDS", 2 * length if in_metric else 1),
    )


def laid_out(code: TrellisCode) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return pairs of levels (period, rows, nodes / 2) at the places that branches lead to, and masks.

    Masks are (period, rows - 1). They say, for each first row, which bits of a place change for two rows: those of the
    lane from bits 0 and 5 on, that of the half in bits 14 and 19. Bits from 20 on count rows in the pairs of levels.
    """
    bits, branches = code.bits, 1 << code.bits
    place, row = np.arange(NODES), np.arange(branches)[:, None]
    levels, masks = [], []
    for t in range(NODE_BITS // math.gcd(NODE_BITS, bits)):
        node = rotated(place, bits * (t + 1))
        before = ((node ^ row) & (branches - 1)) << (NODE_BITS - bits) | node >> bits
        levels.append(code.table[before << bits | node & (branches - 1)])
        changed = rotated(row[:, 0] << (NODE_BITS - bits), -bits * t)  # bits of a place, for a branch of each row
        one, two = changed[:-1], changed[1:]
        lanes, halves = one >> 1 | two >> 1 << 5, (one & 1) << 14 | (two & 1) << 19
        masks.append(lanes | halves | (t * branches + row[:-1, 0]) << 20)
    return np.stack(levels).astype(np.float16).view(np.uint32), np.stack(masks).astype(np.uint32)


@functools.cache
def _tables(bits: int) -> list[mx.array]:
    """Return the first of ``TABLES``, of the codes of both strings of a pair."""
    codes = CODES[bits]
    levels, masks = zip(*(laid_out(code) for code in codes), strict=True)
    table = mx.array(np.stack([code.table for code in codes]))
    pairs = mx.array(np.stack([pair.reshape(-1, LANES) for pair in levels]))
    return [table, pairs, mx.array(masks[0]), mx.array(np.stack([code.row_of_bin for code in codes]))]


@functools.cache
def _sizes(tokens: int) -> mx.array:
    return mx.array([tokens], mx.int32)


@functools.cache
def _runs(codec: TrellisCodec, dtype: mx.Dtype, in_metric: bool) -> bool:
    """Try the kernels once, and compare them with NumPy."""
    random, dim = np.random.default_rng(0), codec.head_dim
    looks = random.normal(size=(1, 2 * dim, dim))
    looked = looks.swapaxes(1, 2) @ looks

    def disagreement() -> float:
        with mx.stream(mx.cpu):  # on the GPU, MLX would compile kernels for these operations
            x = mx.array(random.normal(size=(1, _TRIED, dim)).astype(np.float32)).astype(dtype)
            weights = mx.array(random.uniform(0.5, 1.5, (1, _TRIED)).astype(np.float32))
            mean, order = mx.full((1, 1, dim), 0.1), mx.arange(_TRIED, dtype=mx.int32)[None]
            metric = codec.rounding_metric(looked) if in_metric else None
            expected = codec.encode(x, mean, metric, weights)
            mx.eval(x, mean, order, weights, expected.codes, expected.scales)
        found = encode(x, order, mean[:, 0], codec, metric, weights)
        mx.eval(found.codes, found.scales)
        with mx.stream(mx.cpu):
            ratios = found.scales / expected.scales
            if metric is None:
                levels = [codec.decode_levels(np, np.array(one.codes)) for one in (expected, found)]
                return max(float((levels[0] != levels[1]).mean()), float(mx.abs(ratios - 1).mean()))
            offs = [np.array(codec.decode(one, mean) - x.astype(mx.float32)) for one in (expected, found)]
            before, after = (float((off @ looked * off).sum()) for off in offs)
            return max(abs(after / before - 1), abs(float(ratios.mean()) - 1))

    return runs("trellis kernels", disagreement, MOST_DISAGREEMENT, (codec, str(dtype), in_metric))
