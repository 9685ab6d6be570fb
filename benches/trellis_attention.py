"""Attention over trellis codes on a GPU: how long a layer takes, beside attention over scalar codes of as many bits.

    python -m benches.trellis_attention --tokens 131072 32768

Codes are random. Times are medians in microseconds of both launches, for queued calls, and in brackets for calls that
each wait for the one before. Three figures of each are measured in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from turboquant import CacheCodec, EncodedLayer
from turboquant.attention import gpu
from turboquant.quant.codec import Codec, Encoded
from turboquant.quant.trellis import BLOCK

QUERY_HEADS, HEADS, DIM = 32, 8, 128
CODINGS = "scalar", "trellis"


def random_layer(
    codec: CacheCodec, counts: tuple[int, int, int], heads: int, dim: int, size: float = 1.0
) -> EncodedLayer:
    """Return a layer with random numbers in all tensors: some tokens had their mean subtracted, and some had not.

    counts: coarse tokens, finer ones and sinks. size: of values.
    """
    random = np.random.default_rng(counts)

    def normal(*shape: int) -> mx.array:
        return mx.array(random.normal(size=shape).astype(np.float32))

    def encoded(own: Codec, tokens: int, size: float) -> Encoded:
        codes = random.integers(0, 1 << 32, (heads, tokens, own.words), np.uint32)
        scales = random.uniform(0.2, 1.0, (heads, tokens)) * random.choice([-size, size], (heads, tokens))
        return Encoded(mx.array(codes), mx.array(scales.astype(np.float16)))

    coarse, fine, sinks = counts
    return EncodedLayer(
        codec,
        sink_keys=normal(heads, sinks, dim).astype(mx.float16),
        sink_values=(size * normal(heads, sinks, dim)).astype(mx.float16),
        keys=encoded(codec.keys(dim), coarse, 1.0),
        values=encoded(codec.values(dim), coarse, size),
        fine_keys=encoded(codec.fine.keys(dim), fine, 1.0),
        fine_values=encoded(codec.fine.values(dim), fine, size),
        key_mean=normal(heads, 1, dim),
        value_mean=size * normal(heads, 1, dim),
    )


def counts_of(tokens: int, codec: CacheCodec) -> tuple[int, int, int]:
    """Return how many of a context's tokens are coarse, finer and sinks."""
    fine = sum(codec.fine_tokens(tokens, queries_known=True))
    return tokens - codec.sinks - fine, fine, codec.sinks


def measure(step: Callable[[mx.array], mx.array], queries: mx.array, calls: int = 50) -> tuple[float, float]:
    """Return the microseconds of a call, queued and one after the other: medians of 5."""

    def queued() -> float:
        results = [step(queries) for _ in range(calls)]
        begin = time.perf_counter()
        mx.eval(results)
        return (time.perf_counter() - begin) / calls * 1e6

    def in_turn() -> float:
        x = queries
        for _ in range(calls):
            x = step(x).astype(queries.dtype) * 0.5 + queries
        begin = time.perf_counter()
        mx.eval(x)
        return (time.perf_counter() - begin) / calls * 1e6

    def median(way: Callable[[], float]) -> float:
        way()
        return statistics.median(way() for _ in range(5))

    return median(queued), median(in_turn)


def compare(tokens: int, rows: int, bits: tuple[int, int]) -> str:
    """Measure attention of so many rows over so many tokens; return a line."""
    queries = mx.random.normal((rows, QUERY_HEADS, 1, DIM)).astype(mx.float16)
    found: dict[str, list[tuple[float, float]]] = {coding: [] for coding in CODINGS}
    ways: dict[str, Callable[[mx.array], mx.array]] = {}
    for coding in CODINGS:
        codec = CacheCodec(*bits, coding=coding)
        layer = random_layer(codec, counts_of(tokens, codec), HEADS, DIM)
        assert coding == "scalar" or layer.keys.tokens % BLOCK == 0
        assert gpu.supports(layer)
        ways[coding] = lambda x, layer=layer: gpu.attend_layer(x, layer, DIM**-0.5).output
    for _ in range(3):
        for coding, step in ways.items():
            found[coding].append(measure(step, queries))
    parts = [", ".join(f"{queued:.0f} ({in_turn:.0f})" for queued, in_turn in times) for times in found.values()]
    ratio = min(queued for queued, _ in found["trellis"]) / min(queued for queued, _ in found["scalar"])
    figures = "; ".join(map(" ".join, zip(found, parts, strict=True)))
    return f"{tokens:,} tokens, {rows} rows, bits {bits}: {figures}; {ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072, 32768])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    arguments = parser.parse_args()
    for bits in arguments.bits:
        for tokens in arguments.tokens:
            for rows in arguments.rows:
                print(compare(tokens, rows, (bits, bits)), flush=True)


if __name__ == "__main__":
    main()
