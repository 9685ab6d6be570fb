"""How long a GPU takes to find trellis codes for a layer's keys and values, beside the codec's scalar encoder.

    python -m benches.trellis_encoder --tokens 32768

The layer has 16 query heads and 8 heads of keys and values of 128 coordinates, and random numbers. Times are medians in
milliseconds, each waited for. "Searches" are the kernels of viterbi.py alone: for keys feedback and two sweeps, block
by block, and for values one search. "Keys" are all steps from unit vectors to levels and factors: besides the searches,
products with the metric, which are operations of MLX here. CUDA only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from benches.trellis import BLOCK, Trellis, nearest, round_in_metric
from benches.viterbi import TrellisCode, trained_code
from turboquant import CacheCodec
from turboquant.kernels import encoding_gpu
from turboquant.kernels.encoding import encode_layer, order_tokens
from turboquant.quant.query_stats import QueryCollector
from turboquant.quant.rounding import RoundingMetric

QUERY_HEADS, HEADS, DIM, CHUNK = 16, 8, 128, 2048
CODES = ((4, 9), (4, 8), (3, 8), (2, 8), (2, 7))  # bits of a number, and of a state


def median(run: Callable[[], Any], times: int = 5) -> float:
    """Return the median time of a function in milliseconds, after a first time that compiles kernels."""
    found = []
    for _ in range(1 + times):
        mx.synchronize()
        begin = time.perf_counter()
        mx.eval(run())
        mx.synchronize()
        found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found[1:])


def scalar(tokens: int) -> tuple[mx.array, RoundingMetric]:
    """Print the times of the codec as it is; return the unit vectors of keys (H, dim, T), and their metric."""
    codec = CacheCodec()
    keys, values = (mx.random.normal((HEADS, tokens, DIM)).astype(mx.bfloat16) for _ in range(2))
    collector = QueryCollector(tokens)
    for start in range(0, tokens, CHUNK):
        queries = mx.random.normal((1, QUERY_HEADS, CHUNK, DIM)).astype(mx.bfloat16)
        collector.add(queries, HEADS, start, DIM**-0.5)
    queries = collector.statistics()
    mx.eval(keys, values)
    moment, _, order, _ = order_tokens(keys, codec, queries)
    metric = codec.keys(DIM).rounding_metric(moment, encoding_gpu.feedback)
    none, order = mx.zeros((HEADS, DIM)), order + codec.sinks
    parts: dict[str, Callable[[], Any]] = {
        "whole": lambda: encode_layer(keys, values, codec, queries).tensors(),
        "statistics and order": lambda: order_tokens(keys, codec, queries)[1:3],
        "keys": lambda: list(vars(encoding_gpu.encode(keys, order, none, codec.keys(DIM), metric)).values()),
        "values": lambda: list(vars(encoding_gpu.encode(values, order, none, codec.values(DIM), None)).values()),
    }
    found = ", ".join(f"{name} {median(run):.2f}" for name, run in parts.items())
    print(f"{tokens:,} tokens, scalar: {found}", flush=True)
    unit = codec.keys(DIM).rotation.forward(keys.astype(mx.float32))
    unit = unit / mx.sqrt(mx.square(unit).mean(axis=-1, keepdims=True))
    return mx.contiguous(unit.swapaxes(1, 2).astype(mx.float16)), metric


def trellis(code: TrellisCode, unit: mx.array, metric: RoundingMetric) -> None:
    """Print the times of a trellis code."""
    ones = mx.ones((HEADS, unit.shape[-1]))
    blocks = [slice(i, i + BLOCK) for i in range(0, DIM, BLOCK)]
    given = [(metric.pull[:, some, some], mx.contiguous(unit[:, some])) for some in blocks]
    mx.eval(given)

    def searches(sweeps: int) -> Any:
        """Search all blocks; each waits for the one before, as in ``round_in_metric``."""
        states, levels = [None] * len(blocks), given[0][1]
        for sweep in range(1 + sweeps):
            for i, (pull, exact) in enumerate(given):
                others = pull, exact, levels
                states[i], levels = code.encode(mx, exact, ones, ones, others, sweep == 0, states[i])
        return levels

    def keys(sweeps: int) -> Any:
        return round_in_metric(mx, code, unit, metric, ones, Trellis(code, code, sweeps=sweeps))

    parts: dict[str, Callable[[], Any]] = {
        "searches for keys with 2 sweeps": lambda: searches(2),
        "with 1": lambda: searches(1),
        "for values": lambda: nearest(mx, code, unit, ones),
        "keys with 2 sweeps": lambda: keys(2),
        "with 1 ": lambda: keys(1),
    }
    found = ", ".join(f"{name.strip()} {median(run):.2f}" for name, run in parts.items())
    print(f"{code.bits} bits, {code.table.size} levels: {found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    for tokens in parser.parse_args().tokens:
        unit, metric = scalar(tokens)
        for settings in CODES:
            trellis(trained_code(*settings), unit, metric)


if __name__ == "__main__":
    main()
