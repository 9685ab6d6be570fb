"""How long a GPU takes to encode a layer's keys and values in trellis codes, beside scalar codes.

    python -m benches.trellis_encoder --tokens 32768

The layer has 16 query heads and 8 heads of keys and values of 128 coordinates, and random numbers. Times are medians in
milliseconds, each waited for. "Whole" is ``encode_layer``. "Units" are the kernel that centres, rotates and normalises.
"Keys" and "values" are the kernel that finds strings: for keys rounding with feedback and a sweep, in a metric.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from turboquant import CacheCodec
from turboquant.kernels import encoding_gpu, trellis_search
from turboquant.kernels.encoding import encode_layer, order_tokens
from turboquant.quant.query_stats import QueryCollector, QueryStatistics
from turboquant.quant.trellis import BLOCK, TrellisCodec

QUERY_HEADS, HEADS, DIM, CHUNK = 16, 8, 128, 2048


def median(run: Callable[[], Any], times: int = 7) -> float:
    """Return the median time of a function in milliseconds, after a first time that compiles kernels."""
    found = []
    for _ in range(1 + times):
        mx.synchronize()
        begin = time.perf_counter()
        mx.eval(run())
        mx.synchronize()
        found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found[1:])


def layer(tokens: int) -> tuple[mx.array, mx.array, QueryStatistics]:
    """Return random keys and values (H, T, dim), and statistics of queries."""
    keys, values = (mx.random.normal((HEADS, tokens, DIM)).astype(mx.bfloat16) for _ in range(2))
    collector = QueryCollector(tokens)
    for start in range(0, tokens, CHUNK):
        queries = mx.random.normal((1, QUERY_HEADS, CHUNK, DIM)).astype(mx.bfloat16)
        collector.add(queries, HEADS, start, DIM**-0.5)
    mx.eval(keys, values)
    return keys, values, collector.statistics()


def times_of(codec: CacheCodec, keys: mx.array, values: mx.array, queries: QueryStatistics) -> dict[str, float]:
    """Return the times of a codec, by what is timed."""
    found = {"whole": median(lambda: encode_layer(keys, values, codec, queries).tensors())}
    moment, _, order, fine = order_tokens(keys, codec, queries)
    order = codec.sinks + order[:, : order.shape[1] - fine]
    mx.eval(order)
    found["statistics and order"] = median(lambda: order_tokens(keys, codec, queries)[1:3])
    own, of_values, mean = codec.keys(DIM), codec.values(DIM), mx.zeros((HEADS, DIM))
    metric = own.rounding_metric(moment, encoding_gpu.feedback)
    if not isinstance(own, TrellisCodec) or not isinstance(of_values, TrellisCodec):
        found["keys"] = median(lambda: list(vars(encoding_gpu.encode(keys, order, mean, own, metric)).values()))
        found["values"] = median(lambda: list(vars(encoding_gpu.encode(values, order, mean, of_values, None)).values()))
        return found
    weights = mx.ones(keys.shape[:2])
    found["units"] = median(lambda: trellis_search.units(keys, order, mean, own, weights))
    unit = trellis_search.units(keys, order, mean, own, weights)[0]
    root = mx.ones(order.shape)
    mx.eval(unit, root)
    found["keys"] = median(lambda: trellis_search.choose(own, unit, root, metric))
    found["values"] = median(lambda: trellis_search.choose(of_values, unit, root, None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    for tokens in parser.parse_args().tokens:
        given = layer(tokens // BLOCK * BLOCK)
        for bits in (4, 3, 2):
            for coding in ("scalar", "trellis"):
                found = times_of(CacheCodec(bits, bits, coding=coding), *given)
                text = ", ".join(f"{name} {ms:.2f}" for name, ms in found.items())
                print(f"{tokens:,} tokens, {bits} bits, {coding}: {text}", flush=True)


if __name__ == "__main__":
    main()
