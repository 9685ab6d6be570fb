"""One page about this GPU and the kernels, to paste into an issue: are they right, how fast, how long to compile.

    python -m benches.metal_report [--quick]

Made for Apple's GPUs, on which the kernels have not run yet; it runs on NVIDIA's too. It takes about five minutes. Each
kernel is compared with the reference, which the CPU computes, on random data; speeds are medians beside MLX's own
attention in float16. Nothing is written and nothing is sent.
"""

from __future__ import annotations

import argparse
import functools
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import mlx.core as mx

from turboquant import CacheCodec
from turboquant.attention import gpu as attention_gpu
from turboquant.attention import reference
from turboquant.kernels import encoding_gpu, query_stats_gpu
from turboquant.kernels.encoding import encode_layer
from turboquant.kernels.kernel_text import Beginning
from turboquant.quant.layer import EncodedLayer
from turboquant.runtime.device import on_cpu

BITS = ((2, 2), (3, 3), (4, 4), (4, 3), (3, 2), (2, 6), (5, 8), (8, 4), (6, 5))
HEAD_DIMS = (64, 128, 256)
TOKENS, ROWS = (3, 700, 9001), (1, 3, 20)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
N_HEADS, N_KV_HEADS, SCALE = 16, 8, 0.1
LARGEST_ERROR = 1e-2  # relative; outputs of 16 bits are rounded
SUFFIX, CAPACITY = 70, 256  # tokens of each row's own, and of the buffer that begins with them
ENCODERS = ((4, True), (4, False), (3, True), (8, False))  # bits, and whether in a metric


@dataclass(frozen=True)
class Case:
    """One combination that attention is checked with."""

    head_dim: int
    bits: tuple[int, int]
    tokens: int
    rows: int
    dtype: mx.Dtype


def cases(quick: bool = False) -> list[Case]:
    """Every pair of bits with every head_dim; with 128 also every number of tokens."""
    found = []
    for dim in HEAD_DIMS:
        for bits in BITS:
            for tokens in TOKENS if dim == 128 else TOKENS[len(found) % 3 :][:1]:
                number = len(found)
                found.append(Case(dim, bits, tokens, ROWS[number % 3], DTYPES[number // 3 % 3]))
    return found[::6] if quick else found


def error_of(case: Case) -> float:
    """Return the relative error of a decoding step and of attention over the past alone, the larger one."""
    codec = CacheCodec(*case.bits, extra_bits=1.0)
    with mx.stream(mx.cpu):
        keys, values = (_normal((N_KV_HEADS, case.tokens, case.head_dim), case.dtype, seed) for seed in (0, 1))
        queries = _normal((case.rows, N_HEADS, 1, case.head_dim), case.dtype, 2)
        shape = (case.rows, N_KV_HEADS, CAPACITY, case.head_dim)
        buffers = [_normal(shape, case.dtype, seed) for seed in (3, 4)]
        mask = mx.contiguous(mx.broadcast_to(mx.arange(SUFFIX) >= 5, (case.rows, 1, 1, SUFFIX)))
        mx.eval(keys, values, queries, buffers, mask)
        layer = encode_layer(keys, values, codec)
        own = [x[:, :, :SUFFIX] for x in buffers]
        past = reference.attend_layer(queries, layer, SCALE)
        both = reference.merge([past, reference.attend_dense(queries, *own, SCALE, mask)])
        mx.eval(layer.tensors(), past.output, both.output)
    suffix = [Beginning(x, SUFFIX) for x in buffers]
    found = attention_gpu.attend_step(queries, layer, suffix[0], suffix[1], SCALE, mask)
    alone = attention_gpu._attend(queries, layer, SCALE)[0]
    mx.eval(found, alone)
    with mx.stream(mx.cpu):
        return max(_relative(found, both.output), _relative(alone, past.output))


def report(quick: bool = False) -> Iterator[str]:
    """Yield the lines of the page as they are found."""
    info = mx.device_info()
    yield f"device: {info.get('device_name', '?')}, {info.get('architecture', '?')}; {platform.platform()}"
    yield "versions: " + ", ".join(f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm", "numpy"))
    yield from _compile_times()
    yield from _checks(quick)
    yield from _speeds((4096,) if quick else (4096, 32768, 131072))


def _compile_times() -> Iterator[str]:
    """Time the first trial of each kernel, which compiles it, and the second one, which does not."""
    trials: dict[str, Any] = {
        f"encoder, {bits} bits{', in a metric' if in_metric else ''}": lambda bits=bits, in_metric=in_metric: (
            encoding_gpu.usable(CacheCodec(bits, bits).keys(128), mx.float16, in_metric)
        )
        for bits, in_metric in ENCODERS
    }
    trials |= {"factors of a metric": lambda: encoding_gpu.factors(128), "query statistics": query_stats_gpu.usable}
    trials |= {f"attention, {dim}": lambda dim=dim: attention_gpu.usable(CacheCodec(), dim) for dim in HEAD_DIMS}
    for name, usable in trials.items():
        begin = time.perf_counter()
        verdict = "right" if usable() else "NOT USABLE"
        yield f"tried: {name}: {verdict}, {time.perf_counter() - begin:.2f} s with compiling"


def _checks(quick: bool) -> Iterator[str]:
    worst, wrong = 0.0, 0
    every = cases(quick)
    for case in every:
        _fill_free_memory()
        try:
            error = error_of(case)
        except (RuntimeError, ValueError) as failed:
            error = float("nan")
            yield f"FAILED: {case}: {failed}"
        worst = max(worst, error)
        if not error <= LARGEST_ERROR:
            wrong += 1
            yield f"WRONG: {case}: {error:.2g}"
    yield f"attention: {len(every) - wrong} of {len(every)} combinations right, relative error {worst:.2g} at most"


def _fill_free_memory() -> None:
    """Fill the memory that MLX will give to outputs with NaN, which shows numbers that a kernel does not write."""
    mx.eval([mx.full((1 << size,), float("nan")) for size in range(8, 23) for _ in range(3)])


def _speeds(lengths: tuple[int, ...]) -> Iterator[str]:
    attend = mx.fast.scaled_dot_product_attention
    for tokens in lengths:
        keys, values = (_normal((N_KV_HEADS, tokens, 128), mx.float16, seed) for seed in (0, 1))
        queries = _normal((1, N_HEADS, 1, 128), mx.float16, 2)
        mx.eval(keys, values, queries)
        for _ in range(2):  # the first time, MLX compiles operations of its own
            begin = time.perf_counter()
            layer = encode_layer(keys, values, CacheCodec())
            mx.eval(layer.tensors())
            encoding = time.perf_counter() - begin
        plain = _microseconds(functools.partial(attend, queries, keys[None], values[None], scale=SCALE))
        packed = _microseconds(functools.partial(_attend_packed, queries, layer))
        speeds = f"MLX in float16 {plain:,.0f} us, packed {packed:,.0f} us, {plain / packed:.2f}x"
        yield f"{tokens:>7,} tokens, 1 row: {speeds}; encoded in {encoding * 1e3:.1f} ms, without queries of its own"


def _attend_packed(queries: mx.array, layer: EncodedLayer) -> mx.array:
    return attention_gpu.attend_layer(queries, layer, SCALE).output


def _microseconds(step: Any) -> float:
    """Return the median time of a step, twenty of them queued at a time.

    The time that Python takes to prepare them is not counted: in a model it does that while the GPU computes.
    """
    mx.eval(step())
    took = []
    for _ in range(7):
        steps = [step() for _ in range(20)]
        begin = time.perf_counter()
        mx.eval(steps)
        took.append((time.perf_counter() - begin) / 20 * 1e6)
    return sorted(took)[len(took) // 2]


def _normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _relative(found: mx.array, expected: mx.array) -> float:
    off = found.astype(mx.float32) - expected
    return float(mx.linalg.norm(off.flatten()) / mx.linalg.norm(expected.flatten()))


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one combination in six, one length")
    arguments = parser.parse_args()
    if on_cpu():
        raise SystemExit("there is no GPU that MLX can use: on a Mac, `pip install mlx` brings Metal")
    for line in report(arguments.quick):
        print(line, flush=True)


if __name__ == "__main__":
    main()
