"""Measure how fast compressed K/V are attended and encoded here, beside full precision and mlx-lm's quantised cache.

One decoding step of one layer is timed: each row has one query for each head, and all rows share one context.
The numbers are random, so that attention is spread evenly and no implementation can skip tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import mlx.core as mx

from turboquant.attention import gpu as attention_gpu
from turboquant.attention.dispatch import backend, prepare_kernels
from turboquant.kernels.encoding import encode_layer
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.layer import EncodedLayer
from turboquant.quant.query_stats import QueryCollector
from turboquant.runtime.device import on_cpu

CPU_TOKENS, GPU_TOKENS = (1024, 4096, 16384), (4096, 32768, 131072)
MLX_BITS = 4  # the bits of mlx-lm's quantised cache
GROUP_SIZES = (64, 32)  # mlx-lm's default, and a size for heads that the default does not divide
SECONDS = 0.2  # the shortest time that a figure is measured for
ROUNDS = 5

Attend = Callable[[mx.array], mx.array]
Way = tuple[str, list[Attend], int, float | None]


@dataclass(frozen=True)
class Speed:
    """The time that one way to attend a context needs.

    microseconds: for one step of all rows, the median of ``ROUNDS`` rounds of many steps, queued one after the other.
    nbytes: the bytes of the context's K/V.
    relative: the time of full precision divided by this time.
    milliseconds_to_encode: the time to encode K/V in full precision, with the query statistics of a prefill.
    """

    way: str
    tokens: int
    rows: int
    microseconds: float
    nbytes: int
    relative: float
    milliseconds_to_encode: float | None = None

    @property
    def gigabytes_per_second(self) -> float:
        """The speed at which the context's K/V are read, once in each step."""
        return self.nbytes / self.microseconds / 1e3


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layer: the numbers of query heads, of K/V heads, and of coordinates of a head."""

    heads: int
    kv_heads: int
    head_dim: int


def measure(
    tokens: Sequence[int] | None, rows: Sequence[int], bits: Sequence[tuple[int, int]], sizes: Sizes
) -> Iterator[Speed]:
    """Yield the speed of each way, at each length of context and each number of rows.

    mlx-lm's quantised cache is left out where it has no groups for the heads.

    tokens: the lengths of the context; None for lengths that suit the device.
    rows: the numbers of rows. bits: pairs of key bits and value bits.
    """
    for count in tokens or (CPU_TOKENS if on_cpu() else GPU_TOKENS):
        dtype = mx.float32 if on_cpu() else mx.float16
        keys, values = (mx.random.normal((sizes.kv_heads, count, sizes.head_dim)).astype(dtype) for _ in range(2))
        mx.eval(keys, values)
        for pair in bits:
            prepare_kernels(CacheCodec(*pair), sizes.head_dim, dtype)
        # Each is made ready when its first figure is due, so that the first figure comes soon.
        ways = [partial(_full_precision, keys, values, sizes)]
        if group_size := group_size_for([sizes.head_dim]):
            ways.append(partial(_quantized, keys, values, group_size))
        ways += [partial(_packed, keys, values, CacheCodec(*pair), sizes) for pair in bits]
        ready = [cache(way) for way in ways]
        for number in rows:
            queries = mx.random.normal((number, sizes.heads, 1, sizes.head_dim)).astype(dtype)
            mx.eval(queries)
            base = None
            for name, attends, nbytes, to_encode in (way() for way in ready):
                took = min(_microseconds(attend, queries) for attend in attends)
                base = base or took
                yield Speed(name, count, number, took, nbytes, base / took, to_encode)


def group_size_for(head_dims: Collection[int]) -> int | None:
    """Return a size of mlx-lm's quantisation groups that divides these head_dims, or None."""
    return next((size for size in GROUP_SIZES if not any(dim % size for dim in head_dims)), None)


def machine(bits: Sequence[tuple[int, int]], head_dim: int) -> str:
    """Return the device that MLX computes on, and what attends K/V of these bits and this head_dim there."""
    if on_cpu():
        return "CPU: NumPy and BLAS on compressed K/V"
    name = mx.device_info().get("device_name", "GPU")
    kernels = [attention_gpu.supports_codec(CacheCodec(*pair), head_dim) for pair in bits]
    used = [what for what, there in (("a kernel", any(kernels)), ("MLX operations", not all(kernels))) if there]
    return f"{name}: {' and '.join(used)} on compressed K/V"


def _full_precision(keys: mx.array, values: mx.array, sizes: Sizes) -> Way:
    """Measure MLX's attention, with all rows' queries of a K/V head as heads or as tokens, whichever is faster."""
    attend = mx.fast.scaled_dot_product_attention
    repeats, scale = sizes.heads // sizes.kv_heads, sizes.head_dim**-0.5

    def as_heads(queries: mx.array) -> mx.array:
        grouped = queries.reshape(-1, sizes.kv_heads, repeats, sizes.head_dim).transpose(1, 0, 2, 3)
        folded = grouped.reshape(1, -1, 1, sizes.head_dim)
        return attend(folded, keys[None], values[None], scale=scale)

    def as_tokens(queries: mx.array) -> mx.array:
        return attend(queries.transpose(2, 1, 0, 3), keys[None], values[None], scale=scale)

    return f"full precision, {str(keys.dtype).removeprefix('mlx.core.')}", [as_heads, as_tokens], 2 * keys.nbytes, None


def _quantized(keys: mx.array, values: mx.array, group_size: int) -> Way:
    """Measure mlx-lm's attention over its own quantised cache."""
    from turboquant.mlx_lm.internals import quantized_scaled_dot_product_attention  # mlx-lm takes seconds to import

    packed = [mx.quantize(x[None], group_size=group_size, bits=MLX_BITS) for x in (keys, values)]
    mx.eval(packed)
    scale, nbytes = keys.shape[-1] ** -0.5, sum(part.nbytes for x in packed for part in x)

    def as_tokens(queries: mx.array) -> mx.array:
        output: mx.array = quantized_scaled_dot_product_attention(
            queries.transpose(2, 1, 0, 3), *packed, scale=scale, mask=None, group_size=group_size, bits=MLX_BITS
        )
        return output

    return f"mlx-lm, {MLX_BITS} bits", [as_tokens], nbytes, None


def _packed(keys: mx.array, values: mx.array, codec: CacheCodec, sizes: Sizes) -> Way:
    """Measure turboquant's attention over compressed K/V."""
    scale, collector = sizes.head_dim**-0.5, QueryCollector(keys.shape[1])
    step = 2048
    for start in range(0, keys.shape[1], step):
        shape = (1, sizes.heads, min(step, keys.shape[1] - start), sizes.head_dim)
        collector.add(mx.random.normal(shape).astype(keys.dtype), sizes.kv_heads, start, scale)
    queries = collector.statistics()

    def encode() -> EncodedLayer:
        return encode_layer(keys, values, codec, queries)

    layer = encode()  # a GPU compiles its kernels the first time
    took = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        layer = encode()
        took.append(1e3 * (time.perf_counter() - begin))

    def attend(queries: mx.array) -> mx.array:
        return backend().attend_layer(queries, layer, scale).output

    name = f"turboquant {codec.key_bits}/{codec.value_bits}"
    return name, [attend], layer.nbytes, statistics.median(took)


def _microseconds(attend: Attend, queries: mx.array) -> float:
    """Return the median time of a step. Steps are queued, so Python does not wait for the GPU after each of them."""
    mx.eval(attend(queries))
    begin = time.perf_counter()
    mx.eval(attend(queries))
    once = time.perf_counter() - begin
    count = 1 if on_cpu() else max(2, min(50, int(SECONDS / ROUNDS / once)))
    rounds = max(ROUNDS, int(SECONDS / count / once)) if count == 1 else ROUNDS
    took = []
    for _ in range(rounds):
        begin = time.perf_counter()
        steps = [attend(queries) for _ in range(count)]
        if not on_cpu():  # in a model, Python prepares steps while the GPU computes, so its time is not counted
            begin = time.perf_counter()
        mx.eval(steps)
        took.append(1e6 * (time.perf_counter() - begin) / count)
    return statistics.median(took)
