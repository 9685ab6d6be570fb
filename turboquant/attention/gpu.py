"""Attention over encoded layers on a GPU: two kernels, written once for CUDA and Metal.

The first kernel rotates the queries, looks codes up in tables and multiplies in the matrix units; each thread-group
works on a split of the tokens. The second kernel merges the splits and rotates back. Together they compute the same as
``attend_layer`` of reference.py, which is used for layers of sizes that the kernels do not support. Their text is
``codes.h``, ``tiles.h``, ``attend.h`` and ``merge.h`` in ``kernels/text/``. NVIDIA's Hopper GPUs have another first
kernel for many queries: ``attend_many.h``, ``many.h`` and ``hopper.h``. For layers in trellis codes, the same kernels
have other functions for the coarse tokens: ``trellis.h``, ``trellis_tiles.h`` and ``trellis_many.h``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.attention import reference as attention
from turboquant.attention.reference import Partial
from turboquant.attention.trellis_tables import PAIRS, pairs_of_levels
from turboquant.kernels import trials
from turboquant.kernels.encoding import encode_layer
from turboquant.kernels.kernel_text import Input, Launch
from turboquant.kernels.launch import gpu, launch, runs
from turboquant.kernels.programs import Variant, is_hopper, variant_of
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.codebook import lloyd_max
from turboquant.quant.layer import EncodedLayer
from turboquant.quant.packing import PLANES
from turboquant.quant.trellis import BLOCK, TrellisCodec

HEAD_DIMS = (64, 128, 256)
WARPS = 4  # SIMD-groups a thread-group
TILES, FEW_TILES = 4, 2  # of 8 queries a thread-group, where there are more than 8; the fewer for few tokens
FEW_TOKENS = 8192
GROUPS = {1: 528, 2: 264, 4: 264}  # thread-groups wanted, by tiles: as many as a large GPU's 132 cores hold at once
SPACED = 64  # words between entries of tables, where there is room; see codes.h
HELD_WARPS, HELD_GROUPS = 8, 264  # with such tables, which take 64 KB, for up to 8 queries and many tokens
MANY, MANY_QUERIES, MANY_GROUPS = 32, 64, 264  # more queries than the first number are taken 64 at a time on Hopper
TABLE_COPIES, FEW_COPIES = 32, 8  # of the table of pairs of levels of trellis codes: on Hopper, and at most elsewhere
TRELLIS_WARPS, TRELLIS_TEAMS, TRELLIS_GROUPS = 16, 2, 132  # on Hopper: 32 copies take 128 KB, so one fits on a core
BLOCK_WORDS = 40  # of 8 tokens' 8 coordinates in a tile, with a gap; see many.h
PARTS = {64: 4, 128: 2, 256: 1}  # a merging thread-group's threads, by coordinates: as its registers allow
MOST_SPLITS = 256  # no more than a merging thread-group has threads
SHARED_WORDS = {"cuda": 9216, "metal": 4608}  # of tables, four bytes each
LARGEST_FACTOR = 1024.0
HEADROOM = 6  # powers of two that a weight may grow beyond 1 before the highest score is looked for again
INPUTS = (
    "queries",
    "key_codes",
    "key_scales",
    "value_codes",
    "value_scales",
    "fine_key_codes",
    "fine_value_codes",
    "fine_scales",
    "sinks",
    "constants",
    "plan",
)
MERGE_INPUTS = ("partials", "constants", "plan")

OWN = ("queries", "keys", "values", "mask")  # inputs of a step with tokens of its own
LARGEST_ERROR = 1e-2  # relative; of halves it is below 1e-3
FEWEST = 16  # tokens of each kind in memory, as they are read 16 at a time
SIZES = 16  # whole numbers in a plan, before its floats
AT_ONCE = 8  # splits that a merging thread reads before it needs the first
Bits = tuple[int, int, int, int]
_TRIED = ((2, 200), (2, 200), (1, 4, 1))  # keys, values and queries, of which two belong to each KV head

attend_dense = attention.attend_dense


def attend_layer(queries: mx.array, layer: EncodedLayer, scale: float) -> Partial:
    """See ``attention.attend_layer``."""
    if not supports(layer):
        return attention.attend_layer(queries, layer, scale)
    return Partial(*_attend(queries, layer, scale))


def attend_step(
    queries: mx.array, layer: EncodedLayer, keys: Input, values: Input, scale: float, mask: mx.array | None
) -> mx.array:
    """Attention of one query (B, n_heads, 1, head_dim) a row over a layer and the row's own tokens.

    keys, values: (B, n_kv_heads, T, head_dim), or the larger arrays that begin with them.
    mask: (1, T) or (B or 1, 1, 1, T), true where visible, or None.
    Returns (B, n_heads, 1, head_dim) in the queries' dtype. The layer must be one for which ``supports`` is true.
    """
    own: dict[str, Input] = {"queries": queries, "keys": keys, "values": values}
    if mask is not None:
        own["mask"] = mx.broadcast_to(mask, (queries.shape[0], 1, 1, mask.shape[-1]))
    return _attend(queries, layer, scale, own)[0]


def _attend(
    queries: mx.array, layer: EncodedLayer, scale: float, own: dict[str, Input] | None = None
) -> list[mx.array]:
    """Attention over a layer: the output and the log-sum-exp, float32; with each row's own tokens the output alone."""
    constants = layer.derived or _constants(layer)
    counts = (layer.keys.tokens, layer.fine_keys.tokens, layer.sink_keys.shape[1])
    suffix = () if own is None else tuple(own)
    bits, trellis = _kernel_bits(layer.codec), isinstance(layer.key_codec, TrellisCodec)
    plan = _plan(queries.shape, layer.key_mean.shape[0], counts, scale, bits, trellis, queries.dtype, suffix)
    (partials,) = launch(plan.attend, [queries, *constants.values(), plan.numbers])
    return launch(plan.merge, [partials, constants["constants"], plan.numbers, *(own or {}).values()])


def supports(layer: EncodedLayer) -> bool:
    """Return whether the kernels support a layer's sizes and its codec, and work on this device."""
    if layer.derived:  # by a kernel's first call
        return True
    dim = layer.key_mean.shape[-1]
    return layer.value_mean.shape[-1] == dim and supports_codec(layer.codec, dim)


def supports_codec(codec: CacheCodec, dim: int) -> bool:
    """Return whether there are kernels for layers of this codec and head_dim, and they work on this device."""
    return not codec.is_uncompressed and bool(_kinds(codec, dim)) and usable(codec, dim)


@functools.cache
def usable(codec: CacheCodec, dim: int) -> bool:
    """Return whether the kernels run on this device and agree with attention/reference.py. They are tried once."""

    def error() -> float:
        many_too = not _kinds(codec, dim)[-1].tiles  # asked before the CPU becomes the default device
        with mx.stream(mx.cpu):  # on the GPU, MLX would compile kernels for these operations, for a minute
            keys, values, queries = (
                mx.random.normal((*shape, dim), key=mx.random.key(i)) for i, shape in enumerate(_TRIED)
            )
            layer, some = encode_layer(keys, values, codec), keys[None, :, :20]
            past = attention.attend_layer(queries, layer, 0.125)
            expected = [past, attention.merge([past, attention.attend_dense(queries, some, some, 0.125, None)])]
            many = mx.random.normal((MANY, *_TRIED[2][1:], dim), key=mx.random.key(len(_TRIED)))
            if many_too:
                expected.append(attention.attend_layer(many, layer, 0.125))
            mx.eval(layer.tensors(), queries, some, many, [part.output for part in expected])
        found = [_attend(queries, layer, 0.125)[0], attend_step(queries, layer, some, some, 0.125, None)]
        if many_too:
            found.append(_attend(many, layer, 0.125)[0])
        mx.eval(found)
        with mx.stream(mx.cpu):
            offs = [x - y.output for x, y in zip(found, expected, strict=True)]
            return max(float(mx.linalg.norm(x) / mx.linalg.norm(y.output)) for x, y in zip(offs, expected, strict=True))

    return runs("attention kernels", error, LARGEST_ERROR, (codec, dim))


@dataclass(frozen=True)
class _Plan:
    """The launches and their numbers, which depend on shapes and dtypes alone: made once for all layers and steps.

    numbers: (SIZES + 2,) int32, the last two are the bits of floats; see layout.h.
    """

    attend: Launch
    merge: Launch
    numbers: mx.array


@functools.lru_cache(maxsize=256)
def _plan(
    shape: tuple[int, int, int, int],
    n_kv_heads: int,
    counts: tuple[int, int, int],
    scale: float,
    bits: Bits,
    trellis: bool,
    dtype: mx.Dtype,
    suffix: tuple[str, ...],
) -> _Plan:
    batch, n_heads, length, dim = shape
    rows = batch * (n_heads // n_kv_heads) * length
    kind = _trellis_kind(rows) if trellis else _kind(rows, dim, counts[0])
    blocks = -(-rows // kind.queries)
    most = kind.teams * max(1, min(kind.groups // (n_kv_heads * blocks), MOST_SPLITS // kind.teams))
    splits = max(1, min(most, -(-counts[0] // (BLOCK if trellis else 32 * kind.warps))))
    fine_splits = -(-counts[1] // 64)
    if splits + fine_splits > most:
        fine_splits = 0  # all splits share the finer tokens out
    splits += -(splits + fine_splits) % kind.teams
    attend = _attend_launch(bits, dim, kind, (splits + fine_splits, n_kv_heads, blocks), rows)
    sizes = [batch, n_heads, n_kv_heads, length, *counts, splits + fine_splits, fine_splits]
    numbers = np.zeros(SIZES + 2, np.int32)
    numbers[: len(sizes)] = sizes
    numbers[SIZES:] = np.array([scale * math.log2(math.e), dim**-0.5], np.float32).view(np.int32)
    in_memory = mx.array(numbers)
    mx.eval(in_memory)
    return _Plan(attend, _merge(shape, n_kv_heads, dtype, suffix), in_memory)


@dataclass(frozen=True)
class _Kind:
    """A kind of the first kernel.

    tiles: of 8 queries, which a thread-group attends; 0 in attend_many.h. queries: their number. groups: thread-groups
    wanted. warps: SIMD-groups that share a split out. held: queries are held in registers, and tables are SPACED.
    trellis: for layers in trellis codes, most copies of their table. teams: of so many SIMD-groups in a thread-group,
    each with its own split.
    """

    tiles: int
    queries: int
    groups: int
    warps: int = WARPS
    held: bool = False
    trellis: int = 0
    teams: int = 1


MANY_KIND = _Kind(0, MANY_QUERIES, MANY_GROUPS)
HELD_KIND = _Kind(1, 8, HELD_GROUPS, HELD_WARPS, held=True)
TRELLIS_KIND = _Kind(1, 8, TRELLIS_GROUPS, TRELLIS_WARPS, trellis=TABLE_COPIES)
TRELLIS_MANY_KIND = _Kind(0, MANY_QUERIES, TRELLIS_GROUPS, trellis=TABLE_COPIES, teams=TRELLIS_TEAMS)
SMALL_TRELLIS_KIND = _Kind(1, 8, GROUPS[1], trellis=FEW_COPIES)


def _of_tiles(tiles: int) -> _Kind:
    return _Kind(tiles, 8 * tiles, GROUPS[tiles], WARPS)


def _kind(rows: int, dim: int, tokens: int) -> _Kind:
    """Choose the first kernel for so many queries of each KV head, and so many tokens."""
    on_hopper = dim <= 128 and is_hopper()
    if on_hopper and rows > MANY:
        return MANY_KIND
    if on_hopper and rows <= 8 and tokens > FEW_TOKENS:
        return HELD_KIND
    return _of_tiles(1 if rows <= 8 or dim == 256 else FEW_TILES if tokens <= FEW_TOKENS else TILES)


def _trellis_kind(rows: int) -> _Kind:
    """Choose the first kernel for so many queries of each KV head, and trellis codes."""
    if not is_hopper():
        return SMALL_TRELLIS_KIND
    return TRELLIS_KIND if rows <= TRELLIS_KIND.queries else TRELLIS_MANY_KIND


def _kinds(codec: CacheCodec, dim: int) -> list[_Kind]:
    """Return all kinds for a codec and a head_dim, the one for few queries and few tokens first."""
    in_trellis = {isinstance(own, TrellisCodec) for own in (codec.keys(dim), codec.values(dim))}
    if dim not in HEAD_DIMS or len(in_trellis) > 1:
        return []
    on_hopper = dim <= 128 and is_hopper()
    if in_trellis == {True}:
        return [] if dim == 256 else [TRELLIS_KIND, TRELLIS_MANY_KIND] if on_hopper else [SMALL_TRELLIS_KIND]
    found = [_of_tiles(tiles) for tiles in ((1,) if dim == 256 else (1, FEW_TILES, TILES))]
    return [*found, HELD_KIND, MANY_KIND] if on_hopper else found


def _attend_launch(bits: Bits, dim: int, kind: _Kind, groups: tuple[int, int, int], rows: int) -> Launch:
    splits, n_kv_heads, _ = groups
    constants = _defined(bits, dim, kind)
    dynamic = "DYNAMIC_SHARED" in dict(constants)
    headers: tuple[str, ...] = ("layout.h", "codes.h", "tiles.h")
    if not kind.tiles:
        headers = ("hopper.h", "layout.h", "codes.h", "many.h")
    if kind.trellis:
        headers += ("trellis.h", "trellis_tiles.h" if kind.tiles else "trellis_many.h")
    return Launch(
        "attend" if kind.tiles else "attend_many",
        constants,
        INPUTS,
        (("partials", (n_kv_heads, splits, rows, dim + 4), mx.float32),),
        (-(-splits // kind.teams), *groups[1:]),
        32 * kind.warps * kind.teams,
        headers,
        shared_bytes=4 * int(dict(constants)["SHARED_WORDS"]) if dynamic else 0,
    )


def variants(codec: CacheCodec, dim: int, dtype: mx.Dtype) -> list[Variant | None]:
    """Return the kernels that layers of this codec and head_dim need on CUDA, for a model that computes in ``dtype``.

    The kernels for the trial are included, unless its result is remembered.
    """
    if not _kinds(codec, dim):
        return []
    kinds = dict.fromkeys((*INPUTS, *MERGE_INPUTS), (mx.float16, 3))
    kinds |= {name: (mx.uint32, 3) for name in INPUTS if name.endswith("codes")}
    kinds |= {"sinks": (mx.float16, 4), "constants": (mx.float32, 1), "partials": (mx.float32, 4)}
    kinds |= {"plan": (mx.int32, 1), "mask": (mx.bool_, 4)}
    bits = _kernel_bits(codec)
    trial = () if trials.remembered("attention kernels", (codec, dim), LARGEST_ERROR) else (mx.float32,)
    found = []
    for queries in dict.fromkeys((dtype, *trial)):
        kinds |= dict.fromkeys(("queries", "keys", "values"), (queries, 4))
        of_trial = queries != dtype  # few queries, or many, and no mask
        tried = (_of_tiles(1), MANY_KIND)
        kernels = [kind for kind in _kinds(codec, dim) if not of_trial or kind.trellis or kind in tried]
        launches = [_attend_launch(bits, dim, kind, (1, 1, 1), 1) for kind in kernels]
        for suffix in ((), OWN[:3]) if of_trial else ((), OWN[:3], OWN):
            launches.append(_merge((1, 1, 1, dim), 1, queries, suffix))
        found += [variant_of(what, [kinds[name] for name in what.inputs]) for what in launches]
    return found


def _merge(shape: tuple[int, int, int, int], n_kv_heads: int, dtype: mx.Dtype, suffix: tuple[str, ...]) -> Launch:
    batch, n_heads, length, dim = shape
    outputs: tuple[tuple[str, tuple[int, ...], mx.Dtype], ...] = (("output", shape, dtype),)
    if not suffix:
        outputs = (("output", shape, mx.float32), ("logsumexp", shape[:3], mx.float32))
    return Launch(
        "merge",
        (
            ("DIM", dim),
            ("PARTS", PARTS[dim]),
            ("MOST_SPLITS", MOST_SPLITS),
            ("AT_ONCE", AT_ONCE),
            ("SUFFIX", int(suffix != ())),
            ("MASKED", int("mask" in suffix)),
        ),
        MERGE_INPUTS + suffix,
        outputs,
        (batch * (n_heads // n_kv_heads) * length, n_kv_heads, 1),
        PARTS[dim] * dim,
        ("layout.h",),
        strided=True,
    )


@functools.cache
def _kernel_bits(codec: CacheCodec) -> Bits:
    """Return the bits of keys and values, and of finer keys and values: all of a codec that decides a kernel's text."""
    fine = codec.fine
    return codec.key_bits, codec.value_bits, fine.key_bits, fine.value_bits


def _defined(bits: Bits, dim: int, kind: _Kind) -> tuple[tuple[str, int], ...]:
    """Return the constants that are compiled into the kernel."""
    most = SHARED_WORDS[gpu()]
    large = kind.held or kind.trellis == TABLE_COPIES  # more memory than a text may declare
    if large and kind.tiles:
        copies = fine_copies = SPACED
        tables = [SPACED * 256]
    else:
        copies, fine_copies = (_copies(*pair, most) if kind.tiles else 32 for pair in (bits[:2], bits[2:]))
        tables = [_entries(*pair) * n for pair, n in ((bits[:2], copies), (bits[2:], fine_copies))]
    common: tuple[tuple[str, int], ...] = (
        ("DIM", dim),
        ("THREADS", 32 * kind.warps),
        ("KEY_BITS", bits[0]),
        ("VALUE_BITS", bits[1]),
        ("FINE_KEY_BITS", bits[2]),
        ("FINE_VALUE_BITS", bits[3]),
        ("COPIES", copies),
        ("FINE_COPIES", fine_copies),
        ("HEADROOM", HEADROOM),
        ("TRELLIS", int(kind.trellis > 0)),
    )
    pairs_words = 0
    if kind.trellis:
        table_copies = next(n for n in (32, 8, 4) if n <= kind.trellis and (large or n * PAIRS + 4 * dim <= most))
        common += (("TABLE_COPIES", table_copies),)
        pairs_words = table_copies * PAIRS
    if not kind.tiles:
        tile = BLOCK_WORDS * dim  # of 64 tokens; a team has two, their scales, and tables
        words = kind.teams * (2 * tile + 4 * 64) + (pairs_words or max(tables))
        sizes = ("BLOCK_WORDS", BLOCK_WORDS), ("TILE_WORDS", tile), ("SHARED_WORDS", words)
        return *common, *sizes, ("TEAMS", kind.teams), ("DYNAMIC_SHARED", 1)
    stride = dim + 8  # padded, so that lanes seldom read the same bank of memory
    words = max(8 * kind.tiles * stride, *tables)
    if kind.trellis:  # a table, the queries again, and what SIMD-groups read ahead; or outputs of all SIMD-groups
        stages, ahead = _stages(max(bits[:2]), dim) if large else (0, 0)
        words = max(words, pairs_words + 4 * dim + kind.warps * ahead, kind.warps * 8 * stride)
        common += (("STAGES", stages), ("STAGE_WORDS", ahead))
    found = (
        *common,
        ("TILES", kind.tiles),
        ("ROWS", 8 * kind.tiles),
        ("WARPS", kind.warps),
        ("STRIDE", stride),
        ("HELD", int(kind.held)),
        ("AT_A_TIME", kind.warps if kind.warps * 8 * kind.tiles * stride <= words else 1),
        ("SHARED_WORDS", words),
    )
    # So many thread-groups fit by their memory, so registers are for as many.
    at_once = 2 if kind.held else 1
    return (*found, ("DYNAMIC_SHARED", 1), ("GROUPS_AT_ONCE", at_once)) if large else found


def _stages(bits: int, dim: int) -> tuple[int, int]:
    """Return how many steps of blocks a SIMD-group has in shared memory, see trellis_tiles.h, and the words of all."""
    stages = min(8 if bits == 2 else 4, dim // 16)
    return stages, stages * 64 * bits + BLOCK  # with two scales of each token of a block


def _copies(key_bits: int, value_bits: int, most: int) -> int:
    """Return how many copies of a table fit: 32, 16 or 8. With more copies, lanes wait less for each other."""
    return next(n for n in (32, 16, 8) if _entries(key_bits, value_bits) * n <= most)


def _entries(key_bits: int, value_bits: int) -> int:
    return sum(1 << (2 * bits if bits <= 4 else bits) for bits in {key_bits, value_bits})


def _constants(layer: EncodedLayer) -> dict[str, mx.array]:
    """Return the inputs of the first kernel that depend on the layer alone, in order, made once.

    Sinks are rotated, as codes are. What is small stands together in ``constants``; see layout.h.
    """
    codecs = (layer.codec, layer.codec.fine)
    levels = np.zeros((4, 256, 2), np.float16)
    for row, bits in enumerate(bits for codec in codecs for bits in (codec.key_bits, codec.value_bits)):
        table = _table(bits)
        levels[row, : len(table)] = table
    largest = mx.maximum(_largest(layer.values.scales), _largest(layer.fine_values.scales))
    pairs = [pairs_of_levels(own.bits) for own in (layer.key_codec, layer.value_codec) if isinstance(own, TrellisCodec)]
    rotation = layer.key_codec.rotation
    sinks = (rotation.forward(x) if x.size else x for x in (layer.sink_keys, layer.sink_values))
    of_layer = {
        "key_codes": _padded(layer.keys.codes),
        "key_scales": _padded(layer.keys.scales),
        "value_codes": _padded(layer.values.codes),
        "value_scales": _padded(layer.values.scales),
        "fine_key_codes": _padded(layer.fine_keys.codes),
        "fine_value_codes": _padded(layer.fine_values.codes),
        "fine_scales": mx.stack([_padded(layer.fine_keys.scales), _padded(layer.fine_values.scales)]),
        "sinks": mx.stack([_padded(mx.clip(x, -65504.0, 65504.0).astype(mx.float16)) for x in sinks]),
        "constants": mx.concatenate(
            [
                layer.key_mean.astype(mx.float32).flatten(),
                layer.value_mean.astype(mx.float32).flatten(),
                rotation.signs,
                mx.array(levels).view(mx.float32).flatten(),
                # Weighted values are halves, scaled up as far as none overflows, so that no small one is lost.
                mx.minimum(1.0 / mx.maximum(largest, 1e-30), LARGEST_FACTOR),
                *(mx.array(table).view(mx.float32) for table in pairs),
            ]
        ),
    }
    layer.derived.update(of_layer)
    mx.eval(list(layer.derived.values()))
    return layer.derived


def _padded(x: mx.array) -> mx.array:
    """Pad a tensor (n_kv_heads, T, ...) with zeros to at least FEWEST tokens."""
    missing = max(0, FEWEST - x.shape[1])
    return mx.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]) if missing else x


def _table(bits: int) -> NDArray[np.float16]:
    """Return a table of pairs of levels, (entries, 2).

    Up to 4 bits, the index is two codes: the bits of both in the low plane and, above them, those in the high plane.
    With more bits, the index is one code, whose level stands twice.
    """
    levels = lloyd_max(bits).levels.astype(np.float16)
    if bits > 4:
        return np.stack([levels, levels], axis=-1)
    width = PLANES[bits][0]
    entries, low = np.arange(4**bits), (1 << width) - 1
    one = entries & low | (entries >> 2 * width & 1) << width
    other = entries >> width & low | (entries >> 2 * width + 1 & 1) << width
    return np.stack([levels[one & 2**bits - 1], levels[other & 2**bits - 1]], axis=-1)


def _largest(scales: mx.array) -> mx.array:
    """Return the largest magnitude of each head's scales (n_kv_heads, T), as (n_kv_heads,); 0 if there are none."""
    none = mx.zeros((scales.shape[0], 1))
    return mx.concatenate([none, mx.abs(scales.astype(mx.float32))], axis=1).max(axis=1)
