"""Attention over encoded layers on a GPU: two kernels, written once for CUDA and Metal.

The first kernel rotates the queries, looks codes up in tables and multiplies in the matrix units; each thread-group
works on a split of the tokens. The second kernel merges the splits and rotates back. Together they compute the same as
``attend_layer`` of reference.py, which is used for layers of sizes that the kernels do not support. Their text is
``codes.h``, ``attend.h`` and ``merge.h`` in ``kernels/text/``.
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
from turboquant.kernels import trials
from turboquant.kernels.encoding import encode_layer
from turboquant.kernels.kernel_text import Input, Launch
from turboquant.kernels.launch import gpu, launch, runs
from turboquant.kernels.programs import Variant, variant_of
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.codebook import lloyd_max
from turboquant.quant.layer import EncodedLayer
from turboquant.quant.packing import PLANES

HEAD_DIMS = (64, 128, 256)
WARPS = 4  # SIMD-groups a thread-group
TILES, FEW_TILES = 4, 2  # of 8 queries a thread-group, where there are more than 8; the fewer for few tokens
FEW_TOKENS = 8192
GROUPS = {1: 528, 2: 264, 4: 264}  # thread-groups wanted, by tiles: as many as a large GPU's 132 cores hold at once
PARTS = {64: 4, 128: 4, 256: 1}  # a merging thread-group's threads, by coordinates: as its registers allow
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
    "fine_key_scales",
    "fine_value_codes",
    "fine_value_scales",
    "sink_keys",
    "sink_values",
    "key_mean",
    "value_factors",
    "signs",
    "levels",
    "settings",
    "sizes",
)
MERGE_INPUTS = ("outputs", "sums", "value_mean", "value_factors", "signs", "settings", "sizes")

OWN = ("queries", "keys", "values", "mask")  # inputs of a step with tokens of its own
LARGEST_ERROR = 1e-2  # relative; of halves it is below 1e-3
FEWEST = 16  # tokens of each kind in memory, as they are read 16 at a time
_BY_TOKEN = ("codes", "scales", "sink_keys", "sink_values")  # what names of tensors (n_kv_heads, T, ...) end with
_TRIED = ((2, 200), (2, 200), (1, 4, 1))  # keys, values and queries

attend_dense = attention.attend_dense


def attend_layer(queries: mx.array, layer: EncodedLayer, scale: float) -> Partial:
    """See ``attention.attend_layer``."""
    if not supports(layer):
        return attention.attend_layer(queries, layer, scale)
    return _attend(queries, layer, scale)


def attend_step(
    queries: mx.array, layer: EncodedLayer, keys: Input, values: Input, scale: float, mask: mx.array | None
) -> mx.array:
    """Attention of one query (B, n_heads, 1, head_dim) a row over a layer and the row's own tokens.

    keys, values: (B, n_kv_heads, T, head_dim), or the larger arrays that begin with them.
    mask: (B or 1, 1, 1, T), true where visible, or None.
    Returns (B, n_heads, 1, head_dim) in the queries' dtype. The layer must be one for which ``supports`` is true.
    """
    own: dict[str, Input] = {"queries": queries, "keys": keys, "values": values}
    if mask is not None:
        own["mask"] = mx.broadcast_to(mask, (queries.shape[0], *mask.shape[1:]))
    return _attend(queries, layer, scale, own).output


def _attend(queries: mx.array, layer: EncodedLayer, scale: float, own: dict[str, Input] | None = None) -> Partial:
    """Attention over a layer and, if there are any, each row's own tokens; the output then has the queries' dtype."""
    counts = (layer.keys.tokens, layer.fine_keys.tokens, layer.sink_keys.shape[1])
    dtype, suffix = (mx.float32, ()) if own is None else (queries.dtype, tuple(own))
    plan = _plan(queries.shape, layer.key_mean.shape[0], counts, scale, layer.codec, dtype, suffix)
    inputs: dict[str, Input] = {
        **_constants(layer),
        "queries": queries,
        "settings": plan.settings,
        "sizes": plan.sizes,
        **(own or {}),
    }
    inputs["outputs"], inputs["sums"] = launch(plan.attend, [inputs[name] for name in plan.attend.inputs])
    output, logsumexp = launch(plan.merge, [inputs[name] for name in plan.merge.inputs])
    return Partial(output, logsumexp)


def supports(layer: EncodedLayer) -> bool:
    """Return whether the kernels support a layer's sizes and its codec, and work on this device."""
    if layer.codec.is_uncompressed:
        return False
    dim = layer.key_mean.shape[-1]
    return dim in HEAD_DIMS and layer.value_mean.shape[-1] == dim and usable(layer.codec, dim)


@functools.cache
def usable(codec: CacheCodec, dim: int) -> bool:
    """Return whether the kernels run on this device and agree with attention/reference.py. They are tried once."""

    def error() -> float:
        with mx.stream(mx.cpu):  # on the GPU, MLX would compile kernels for these operations, for a minute
            keys, values, queries = (
                mx.random.normal((*shape, dim), key=mx.random.key(i)) for i, shape in enumerate(_TRIED)
            )
            layer, some = encode_layer(keys, values, codec), keys[None, :, :20]
            past = attention.attend_layer(queries, layer, 0.125)
            expected = [past, attention.merge([past, attention.attend_dense(queries, some, some, 0.125, None)])]
            mx.eval(layer.tensors(), queries, some, [part.output for part in expected])
        found = [_attend(queries, layer, 0.125).output, attend_step(queries, layer, some, some, 0.125, None)]
        mx.eval(found)
        with mx.stream(mx.cpu):
            offs = [x - y.output for x, y in zip(found, expected, strict=True)]
            return max(float(mx.linalg.norm(x) / mx.linalg.norm(y.output)) for x, y in zip(offs, expected, strict=True))

    return runs("attention kernels", error, LARGEST_ERROR, (codec, dim))


@dataclass(frozen=True)
class _Plan:
    """The launches and their settings, which depend on shapes alone: made once for all layers and steps."""

    attend: Launch
    merge: Launch
    settings: mx.array
    sizes: mx.array


@functools.lru_cache(maxsize=256)
def _plan(
    shape: tuple[int, int, int, int],
    n_kv_heads: int,
    counts: tuple[int, int, int],
    scale: float,
    codec: CacheCodec,
    dtype: mx.Dtype,
    suffix: tuple[str, ...],
) -> _Plan:
    batch, n_heads, length, dim = shape
    rows = batch * (n_heads // n_kv_heads) * length
    tiles = 1 if rows <= 8 or dim == 256 else FEW_TILES if counts[0] <= FEW_TOKENS else TILES
    blocks = -(-rows // (8 * tiles))
    splits = max(1, min(GROUPS[tiles] // (n_kv_heads * blocks), -(-counts[0] // (32 * WARPS)), MOST_SPLITS))
    attend = _attend_launch(codec, dim, tiles, (splits, n_kv_heads, blocks), rows)
    settings = mx.array([scale * math.log2(math.e), dim**-0.5, *[0.0] * 6])
    sizes = mx.array([batch, n_heads, n_kv_heads, length, *counts, splits], mx.int32)
    mx.eval(settings, sizes)
    return _Plan(attend, _merge(shape, n_kv_heads, dtype, suffix), settings, sizes)


def _attend_launch(codec: CacheCodec, dim: int, tiles: int, groups: tuple[int, int, int], rows: int) -> Launch:
    splits, n_kv_heads, _ = groups
    return Launch(
        "attend",
        _defined(codec, dim, tiles),
        INPUTS,
        (
            ("outputs", (n_kv_heads, splits, rows, dim), mx.float32),
            ("sums", (n_kv_heads, splits, rows, 3), mx.float32),
        ),
        groups,
        32 * WARPS,
        ("codes.h",),
    )


def variants(codec: CacheCodec, dim: int, dtype: mx.Dtype) -> list[Variant | None]:
    """Return the kernels that layers of this codec and head_dim need on CUDA, for a model that computes in ``dtype``.

    The kernels for the trial are included, unless its result is remembered.
    """
    if dim not in HEAD_DIMS:
        return []
    kinds = dict.fromkeys((*INPUTS, *MERGE_INPUTS), (mx.float32, 1))
    kinds |= {name: (mx.uint32, 3) for name in INPUTS if name.endswith(("codes", "levels"))}
    kinds |= {name: (mx.float16, 3) for name in INPUTS if name.endswith("scales") or name.startswith("sink")}
    kinds |= {"sizes": (mx.int32, 1), "mask": (mx.bool_, 4)}
    trial = () if trials.remembered("attention kernels", (codec, dim), LARGEST_ERROR) else (mx.float32,)
    found = []
    for queries in dict.fromkeys((dtype, *trial)):
        kinds |= dict.fromkeys(("queries", "keys", "values"), (queries, 4))
        launches = [_attend_launch(codec, dim, tiles, (1, 1, 1), 1) for tiles in ((1,) if dim == 256 else (1, 2, 4))]
        for suffix in ((), OWN[:3], OWN):
            launches.append(_merge((1, 1, 1, dim), 1, queries if suffix else mx.float32, suffix))
        if queries != dtype:  # the trial has few queries and no mask
            launches = [launches[0], *launches[-3:-1]]
        found += [variant_of(what, [kinds[name] for name in what.inputs]) for what in launches]
    return found


def _merge(shape: tuple[int, int, int, int], n_kv_heads: int, dtype: mx.Dtype, suffix: tuple[str, ...]) -> Launch:
    batch, n_heads, length, dim = shape
    return Launch(
        "merge",
        (
            ("DIM", dim),
            ("PARTS", PARTS[dim]),
            ("MOST_SPLITS", MOST_SPLITS),
            ("SUFFIX", int(suffix != ())),
            ("MASKED", int("mask" in suffix)),
        ),
        MERGE_INPUTS + suffix,
        (("output", shape, dtype), ("logsumexp", shape[:3], mx.float32)),
        (batch * (n_heads // n_kv_heads) * length, n_kv_heads, 1),
        PARTS[dim] * dim,
        strided=True,
    )


def _defined(codec: CacheCodec, dim: int, tiles: int) -> tuple[tuple[str, int], ...]:
    """Return the constants that are compiled into the kernel."""
    most = SHARED_WORDS[gpu()]
    fine = codec.fine
    copies, fine_copies = (_copies(x.key_bits, x.value_bits, most) for x in (codec, fine))
    tables = (_entries(x.key_bits, x.value_bits) * n for x, n in ((codec, copies), (fine, fine_copies)))
    return (
        ("DIM", dim),
        ("TILES", tiles),
        ("ROWS", 8 * tiles),
        ("WARPS", WARPS),
        ("THREADS", 32 * WARPS),
        ("KEY_BITS", codec.key_bits),
        ("VALUE_BITS", codec.value_bits),
        ("FINE_KEY_BITS", fine.key_bits),
        ("FINE_VALUE_BITS", fine.value_bits),
        ("COPIES", copies),
        ("FINE_COPIES", fine_copies),
        ("STRIDE", dim + 8),  # padded, so that lanes seldom read the same bank of memory
        ("HEADROOM", HEADROOM),
        ("SHARED_WORDS", max(8 * tiles * (dim + 8), *tables)),
    )


def _copies(key_bits: int, value_bits: int, most: int) -> int:
    """Return how many copies of a table fit: 32, 16 or 8. With more copies, lanes wait less for each other."""
    return next(n for n in (32, 16, 8) if _entries(key_bits, value_bits) * n <= most)


def _entries(key_bits: int, value_bits: int) -> int:
    return sum(1 << (2 * bits if bits <= 4 else bits) for bits in {key_bits, value_bits})


def _constants(layer: EncodedLayer) -> dict[str, mx.array]:
    """Return the inputs of the kernels that depend on the layer alone, made once. Sinks are rotated, as codes are."""
    if not layer.derived:
        codecs = (layer.codec, layer.codec.fine)
        levels = np.zeros((4, 256, 2), np.float16)
        for row, bits in enumerate(bits for codec in codecs for bits in (codec.key_bits, codec.value_bits)):
            table = _table(bits)
            levels[row, : len(table)] = table
        largest = mx.maximum(_largest(layer.values.scales), _largest(layer.fine_values.scales))
        rotation = layer.key_codec.rotation
        sinks = (rotation.forward(x) if x.size else x for x in (layer.sink_keys, layer.sink_values))
        sink_keys, sink_values = (mx.clip(x, -65504.0, 65504.0).astype(mx.float16) for x in sinks)
        tensors = layer.tensors() | {
            "sink_keys": sink_keys,
            "sink_values": sink_values,
            # Weighted values are halves, scaled up as far as none overflows, so that no small one is lost.
            "value_factors": mx.minimum(1.0 / mx.maximum(largest, 1e-30), LARGEST_FACTOR),
            "signs": rotation.signs,
            "levels": mx.array(levels).view(mx.uint32),
        }
        layer.derived.update({name: _padded(x) if name.endswith(_BY_TOKEN) else x for name, x in tensors.items()})
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
