"""How fast a layer's compressed K/V are attended and made on this machine, beside full precision and mlx-lm's.

One decoding step of one layer: each row asks one query a head of a context that all rows share. Random numbers, whose
attention is spread as evenly as can be: no tokens are skipped by anything measured here. Knows kernels and clocks; what
compression does to a model is divergence.py's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from turboquant.attention import gpu as attention_gpu
from turboquant.attention.dispatch import backend
from turboquant.kernels.encoding import encode_layer
from turboquant.mlx_lm.internals import quantized_scaled_dot_product_attention
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.layer import EncodedLayer
from turboquant.quant.query_stats import QueryCollector
from turboquant.runtime.device import on_cpu

CPU_TOKENS, GPU_TOKENS = (1024, 4096, 16384), (4096, 32768, 131072)
MLX_BITS = 4  # of mlx-lm's quantised cache
SECONDS = 0.2  # that a figure is measured for, at least
ROUNDS = 5

Attend = Callable[[mx.array], mx.array]
Way = tuple[str, list[Attend], int, float | None]


@dataclass(frozen=True)
class Speed:
    """What one way to attend a context takes.

    microseconds: a step of all rows, the median of ``ROUNDS`` rounds of many steps queued one behind the other.
    nbytes: of the context's K/V. relative: full precision's microseconds by these. milliseconds_to_encode: from K/V in
    full precision, with what a prefill gathers of the context's queries.
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
        """Of the context's K/V, read once a step."""
        return self.nbytes / self.microseconds / 1e3


@dataclass(frozen=True)
class Sizes:
    """Of a layer: query heads, K/V heads and coordinates a head."""

    heads: int
    kv_heads: int
    head_dim: int


def measure(
    tokens: Sequence[int] | None, rows: Sequence[int], bits: Sequence[tuple[int, int]], sizes: Sizes
) -> Iterator[Speed]:
    """Each way's speed at each length of context and number of rows, in that order.

    tokens: by default what suits the device.
    """
    for count in tokens or (CPU_TOKENS if on_cpu() else GPU_TOKENS):
        dtype = mx.float32 if on_cpu() else mx.float16
        keys, values = (mx.random.normal((sizes.kv_heads, count, sizes.head_dim)).astype(dtype) for _ in range(2))
        mx.eval(keys, values)
        ways = [_full_precision(keys, values, sizes), _quantized(keys, values)]
        ways += [_packed(keys, values, CacheCodec(*pair), sizes) for pair in bits]
        for number in rows:
            queries = mx.random.normal((number, sizes.heads, 1, sizes.head_dim)).astype(dtype)
            mx.eval(queries)
            base = None
            for name, attends, nbytes, to_encode in ways:
                took = min(_microseconds(attend, queries) for attend in attends)
                base = base or took
                yield Speed(name, count, number, took, nbytes, base / took, to_encode)


def machine() -> str:
    """The device that MLX computes on, and what attends compressed K/V there."""
    if on_cpu():
        return "CPU: NumPy and BLAS on compressed K/V"
    name = mx.device_info().get("device_name", "GPU")
    return f"{name}: {'a kernel' if attention_gpu.usable(CacheCodec(), 128) else 'MLX operations'} on compressed K/V"


def _full_precision(keys: mx.array, values: mx.array, sizes: Sizes) -> Way:
    """MLX's attention, with all rows' queries of a K/V head side by side: as heads, or as tokens, which is faster."""
    attend = mx.fast.scaled_dot_product_attention
    repeats, scale = sizes.heads // sizes.kv_heads, sizes.head_dim**-0.5

    def as_heads(queries: mx.array) -> mx.array:
        grouped = queries.reshape(-1, sizes.kv_heads, repeats, sizes.head_dim).transpose(1, 0, 2, 3)
        folded = grouped.reshape(1, -1, 1, sizes.head_dim)
        return attend(folded, keys[None], values[None], scale=scale)

    def as_tokens(queries: mx.array) -> mx.array:
        return attend(queries.transpose(2, 1, 0, 3), keys[None], values[None], scale=scale)

    return f"full precision, {str(keys.dtype).removeprefix('mlx.core.')}", [as_heads, as_tokens], 2 * keys.nbytes, None


def _quantized(keys: mx.array, values: mx.array) -> Way:
    """mlx-lm's attention over its own quantised cache."""
    packed = [mx.quantize(x[None], group_size=64, bits=MLX_BITS) for x in (keys, values)]
    mx.eval(packed)
    scale, nbytes = keys.shape[-1] ** -0.5, sum(part.nbytes for x in packed for part in x)

    def as_tokens(queries: mx.array) -> mx.array:
        output: mx.array = quantized_scaled_dot_product_attention(
            queries.transpose(2, 1, 0, 3), *packed, scale=scale, mask=None, group_size=64, bits=MLX_BITS
        )
        return output

    return f"mlx-lm, {MLX_BITS} bits", [as_tokens], nbytes, None


def _packed(keys: mx.array, values: mx.array, codec: CacheCodec, sizes: Sizes) -> Way:
    """This package's attention."""
    scale, collector = sizes.head_dim**-0.5, QueryCollector(keys.shape[1])
    step = 2048
    for start in range(0, keys.shape[1], step):
        shape = (1, sizes.heads, min(step, keys.shape[1] - start), sizes.head_dim)
        collector.add(mx.random.normal(shape).astype(keys.dtype), sizes.kv_heads, start, scale)
    queries = collector.statistics()

    def encode() -> EncodedLayer:
        return encode_layer(keys, values, codec, queries)

    layer = encode()  # what a GPU compiles it compiles once
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
    """The median time of a step; steps are queued, so that a GPU is not waited for after each."""
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
        if not on_cpu():  # what Python takes is a model's business; there it runs while the GPU computes
            begin = time.perf_counter()
        mx.eval(steps)
        took.append(1e6 * (time.perf_counter() - begin) / count)
    return statistics.median(took)
