"""Prefill and decoding steps of rows that share one context: mlx-lm with a copy of the cache a row, and ours.

    python -m benches.big FOLDER
    python -m benches.steps --model FOLDER/model [--tokens 16384 65536] [--rows 1 8 32]

Random tokens. Prefill: the second time, in tokens a second, ours with encoding. Steps: the median of 30, in
milliseconds, and the peak of MLX's memory. What does not fit is left out.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

STEPS, WARM_UP = 40, 10
CHUNK = 2048  # tokens of a prefill's step, mlx-lm's default


def step(model: Any, caches: Sequence[Any], vocabulary: int) -> tuple[float, int]:
    """Milliseconds a step of as many rows as there are caches, and bytes at most."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    mx.reset_peak_memory()
    count = len(caches)
    generator = BatchGenerator(model, stop_tokens=[], completion_batch_size=count, prefill_batch_size=count)
    prompts = [random_tokens(20 + row % 5, vocabulary, row) for row in range(count)]
    generator.insert(prompts, max_tokens=[STEPS] * count, caches=list(caches))
    times = []
    while generator.next_generated():
        times.append(time.perf_counter())
    generator.close()
    steps = [1e3 * (after - before) for before, after in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
    return statistics.median(steps), mx.get_peak_memory()


def random_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    """Tokens of the upper half of a vocabulary, where there are no special ones."""
    draw = random.Random(seed)
    return [draw.randrange(vocabulary // 2, vocabulary) for _ in range(count)]


def main() -> None:
    """Print a line for each length, number of rows and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from pipeline.models.loading import load_model
    from turboquant import CacheCodec, enabled, prefill
    from turboquant.caches.prefix import feed, make_resident

    loaded = load_model(arguments.model)
    model, vocabulary = loaded.model, int(loaded.config["vocab_size"])
    for tokens in arguments.tokens:
        context = random_tokens(tokens, vocabulary, -1)
        for _ in range(2):  # the first time compiles kernels
            begin = time.perf_counter()
            stock = make_prompt_cache(model)
            feed(model, stock, context, CHUNK)
            fed = time.perf_counter()
            packed = prefill(model, context, CacheCodec(), CHUNK)
            mx.synchronize()
            plain, ours = fed - begin, time.perf_counter() - fed
        print(f"{tokens:8,} tokens  prefill: {tokens / plain:,.0f} tokens/s, ours {tokens / ours:,.0f}", flush=True)
        (dense,) = make_resident([packed], "dense")
        for rows in arguments.rows:
            ways = {
                "no context": lambda: make_prompt_cache(model),
                "copied": lambda stock=stock: stock,
                "dense": dense.fork,
                "packed": packed.fork,
            }
            for name, fork in ways.items():
                with enabled(model):
                    try:
                        milliseconds, peak = step(model, [fork() for _ in range(rows)], vocabulary)
                    except RuntimeError as error:
                        print(f"{tokens:8,} tokens {rows:4} rows  {name:12} {str(error)[:60]}", flush=True)
                        continue
                    finally:
                        mx.clear_cache()
                print(
                    f"{tokens:8,} tokens {rows:4} rows  {name:12}{milliseconds:8.1f} ms{peak / 1e9:8.1f} GB", flush=True
                )


if __name__ == "__main__":
    main()
