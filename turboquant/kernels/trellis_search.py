"""Find strings of trellis codes on a GPU: one kernel makes packed words and factors from unit vectors.

It computes the same as the parts of ``TrellisCodec.encode`` that NumPy does on a CPU: ``viterbi.search`` for all
coordinates, rounding in a metric with it, and packing. Its text is ``viterbi.h``, ``products.h`` and ``search.h`` in
``text/``, written once for CUDA and Metal. A SIMD-group works on 256 numbers of a coordinate of keys at a time, or on 128
of values.
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
from turboquant.quant.rounding import RoundingMetric
from turboquant.quant.trellis import BLOCK, CODES, PAIRS, SWEEPS, TrellisCodec
from turboquant.quant.viterbi import BINS, NODE_BITS, REACH, WINDOW, TrellisCode
from turboquant.runtime.device import on_cpu

NODES, LANES = 1 << NODE_BITS, 1 << (NODE_BITS - 1)  # a lane holds the costs of two nodes
STEP = 16  # coordinates whose errors move each other one by one
LOOKAHEAD = 8  # numbers after which the best path has mostly met the final one: lanes follow it in parts
AHEAD = 3  # records that are read beyond a string's end
TABLES = ("table", "level_pairs", "masks", "row_of_bin", "sizes")
METRIC = ("feedback", "pull", "damped")
MOST_DISAGREEMENT = 0.02  # share of levels that may differ from NumPy's, or of the error in a metric
_TRIED = 3 * BLOCK  # tokens


def usable(codec: TrellisCodec, in_metric: bool) -> bool:
    """Return whether there is a GPU, and its kernel agrees with ``TrellisCodec.encode`` on a CPU."""
    return not on_cpu() and _runs(codec, in_metric)


def choose(
    codec: TrellisCodec, unit: mx.array, root: mx.array, metric: RoundingMetric | None
) -> tuple[mx.array, mx.array]:
    """Do what ``TrellisCodec.choose`` does: unit (H, dim, T), root (H, T); returns words (H, T, words) and factors."""
    heads, dim, tokens = unit.shape
    what = _launch(codec, metric is not None, heads, tokens)
    inputs = [unit.astype(mx.float16), root, *_tables(codec.bits), _sizes(tokens)]
    if metric is not None:
        inputs += [mx.array(x).astype(mx.float16) for x in (metric.factor, metric.pull, metric.damped)]
    words, factors, *_ = launch(what, inputs)
    return words, factors if metric is not None else mx.sqrt(dim / factors.sum(axis=1))


def variants(codec: CacheCodec, dim: int) -> list[Variant | None]:
    """Return the kernels that encode a model's layers on CUDA."""
    kinds = {"unit": (mx.float16, 3), "root": (mx.float32, 2)} | dict.fromkeys(METRIC, (mx.float16, 3))
    kinds |= {"table": (mx.float32, 2), "level_pairs": (mx.uint32, 3), "masks": (mx.uint32, 2)}
    kinds |= {"row_of_bin": (mx.uint8, 2), "sizes": (mx.int32, 1)}
    found = []
    for own, in_metric in ((codec.keys(dim), codec.query_aware), (codec.values(dim), False)):
        if isinstance(own, TrellisCodec):
            what = _launch(own, in_metric, 1, BLOCK)
            found.append(variant_of(what, [kinds[name] for name in what.inputs]))
    return found


def _launch(codec: TrellisCodec, in_metric: bool, heads: int, tokens: int) -> Launch:
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
    own, rows = length // LANES, 1 << bits
    period, codes = NODE_BITS // math.gcd(NODE_BITS, bits), 1 if keys else 2
    records = length + (length + AHEAD) // own + AHEAD
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
        ("OWN", own),
        ("ROWS", rows),
        ("PERIOD", period),
        ("WINDOW", WINDOW),
        ("LOOKAHEAD", LOOKAHEAD),
        ("AHEAD", AHEAD),
        ("BINS", BINS),
        ("REACH", REACH),
        ("RECORDS", records),
        ("LEVEL_WORDS", period * rows * 32),
        ("STATE_WORDS", codes * rows * NODES),
        ("CHANGE_WORDS", STEP * length if in_metric else 1),
        ("PULL_WORDS", STEP * STEP if in_metric else 1),
        ("END_WORDS", codec.head_dim // 2 if in_metric else 1),
        ("SCALE_WORDS", 2 * length if in_metric else 1),
    )


def laid_out(code: TrellisCode) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return pairs of levels (period, rows, nodes / 2) at the places that branches lead to, and masks (period, rows - 1).

    A mask, for each first row, says which bits of a place change, for two rows: those of the lane from bits 0 and 5 on,
    that of the half in bits 14 and 19. Bits from 20 on count rows in the pairs of levels.
    """
    bits, branches = code.bits, 1 << code.bits
    place, row = np.arange(NODES), np.arange(branches)[:, None]
    levels, masks = [], []
    for t in range(NODE_BITS // math.gcd(NODE_BITS, bits)):
        node = _rotated(place, bits * (t + 1))
        before = ((node ^ row) & (branches - 1)) << (NODE_BITS - bits) | node >> bits
        levels.append(code.table[before << bits | node & (branches - 1)])
        changed = _rotated(row[:, 0] << (NODE_BITS - bits), -bits * t)  # bits of a place, for a branch of each row
        one, two = changed[:-1], changed[1:]
        lanes, halves = one >> 1 | two >> 1 << 5, (one & 1) << 14 | (two & 1) << 19
        masks.append(lanes | halves | (t * branches + row[:-1, 0]) << 20)
    return np.stack(levels).astype(np.float16).view(np.uint32), np.stack(masks).astype(np.uint32)


def _rotated(node: NDArray[np.int64], by: int) -> NDArray[np.int64]:
    by %= NODE_BITS
    return (node << by | node >> (NODE_BITS - by)) & (NODES - 1)


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
def _runs(codec: TrellisCodec, in_metric: bool) -> bool:
    """Try the kernel once, and compare it with NumPy."""
    random = np.random.default_rng(0)
    unit = random.normal(size=(1, codec.head_dim, _TRIED)).astype(np.float16).astype(np.float32)
    root = random.uniform(0.5, 1.5, (1, _TRIED)).astype(np.float32)
    looks = random.normal(size=(1, 2 * codec.head_dim, codec.head_dim))
    metric = RoundingMetric.prepare(np, looks.swapaxes(1, 2) @ looks) if in_metric else None

    def disagreement() -> float:
        given = mx.array(unit), mx.array(root)
        results = []
        for chosen in (codec.choose(np, unit, root, metric), choose(codec, *given, metric)):
            words, factors = np.array(chosen[0]), np.array(chosen[1])
            results.append((codec.decode_levels(np, words), factors))
        (expected, expected_factors), (found, factors) = results
        scales = float(np.abs(factors / expected_factors - 1).mean())
        if metric is None:
            return max(float((expected != found).mean()), scales)
        errors = [_error(unit, levels, factor, metric) for levels, factor in results]
        return max(abs(errors[1] / errors[0] - 1), scales)

    return runs("trellis search kernels", disagreement, MOST_DISAGREEMENT, (codec, in_metric))


def _error(
    unit: NDArray[np.float32], levels: NDArray[np.float32], factors: NDArray[np.float32], metric: RoundingMetric
) -> float:
    off = factors[:, None] * levels.swapaxes(1, 2) - unit
    return float((off * (metric.damped @ off)).sum())
