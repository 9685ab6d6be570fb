"""Prefill and decoding steps of rows that share one context: mlx-lm with a copy of the cache a row, and ours.

    python -m benches.big FOLDER
    python -m benches.steps --model FOLDER/model [--tokens 16384 65536] [--rows 1 8 32]

Random tokens. Prefill: medians after a first time that compiles kernels, in tokens a second; what encoding adds to
ours, in milliseconds a layer and in percent of mlx-lm's time. Steps (none with ``--rows`` alone): the median of 30, in
milliseconds, and the most memory that the model, the context and the rows take. What does not fit is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turboquant import Prefix

STEPS, WARM_UP = 40, 10
PREFILLS = 3  # of which the median counts
CHUNK = 2048  # tokens of a prefill's step, mlx-lm's default


def step(model: Any, caches: Sequence[Any], vocabulary: int) -> tuple[float, int]:
    """Milliseconds a step of as many rows as there are caches, and bytes at most besides what is held before."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator

    mx.reset_peak_memory()
    held = mx.get_active_memory()
    count = len(caches)
    generator = BatchGenerator(model, stop_tokens=[], completion_batch_size=count, prefill_batch_size=count)
    prompts = [random_tokens(20 + row % 5, vocabulary, row) for row in range(count)]
    generator.insert(prompts, max_tokens=[STEPS] * count, caches=list(caches))
    times = []
    while generator.next_generated():
        times.append(time.perf_counter())
    generator.close()
    steps = [1e3 * (after - before) for before, after in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
    return statistics.median(steps), mx.get_peak_memory() - held


def prefill_both(model: Any, context: Sequence[int]) -> tuple[list[Any], Prefix]:
    """Prefill a context by mlx-lm and by ours, in turn; print the speeds, and return both caches."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from turboquant import CacheCodec, enabled, prefill
    from turboquant.caches.prefix import feed, prefill_caches
    from turboquant.mlx_lm.dequantized_products import dequantized_products
    from turboquant.mlx_lm.families import explain

    def stock() -> list[Any]:
        caches: list[Any] = make_prompt_cache(model)
        feed(model, caches, context, CHUNK)
        return caches

    def not_encoded() -> None:
        with enabled(model), dequantized_products():
            feed(model, prefill_caches(model, len(context), explain(model).layers), context, CHUNK)

    def ours() -> Prefix:
        return prefill(model, context, CacheCodec(), CHUNK)

    def timed(way: Callable[[], Any]) -> tuple[float, Any]:
        mx.synchronize()
        begin = time.perf_counter()
        made = way()
        mx.synchronize()
        return time.perf_counter() - begin, made

    rounds = []
    for _ in range(1 + PREFILLS):
        plain, caches = timed(stock)
        before, _ = timed(not_encoded)
        whole, prefix = timed(ours)
        rounds.append((plain, before, whole))
    plain, before, whole = (statistics.median(way) for way in zip(*rounds[1:], strict=True))
    count, encoding = len(context), whole - before
    rates = {"mlx_lm_prefill_tokens_per_s": round(count / plain), "prefill_tokens_per_s": round(count / whole)}
    each = {"encoding_ms_per_layer": round(1e3 * encoding / len(model.layers), 1)}
    each |= {"encoding_percent_of_mlx_lm_prefill": round(100 * encoding / plain)}
    print(json.dumps({"tokens": count, **rates, **each}), flush=True)
    return caches, prefix


def random_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    """Tokens of the upper half of a vocabulary, where there are no special ones."""
    draw = random.Random(seed)
    return [draw.randrange(vocabulary // 2, vocabulary) for _ in range(count)]


def main() -> None:
    """Print a line of JSON for each length, number of rows and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32])
    arguments = parser.parse_args()
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from pipeline.models.loading import load_model
    from turboquant import enabled
    from turboquant.caches.prefix import make_resident

    loaded = load_model(arguments.model)
    model, vocabulary = loaded.model, int(loaded.config["vocab_size"])
    mx.eval(model.parameters())
    weights = mx.get_active_memory()
    for tokens in arguments.tokens:
        context = random_tokens(tokens, vocabulary, -1)
        stock, packed = prefill_both(model, context)
        (dense,) = make_resident([packed], "dense")
        for rows in arguments.rows:
            ways: dict[str, tuple[Callable[[], Any], int]] = {
                "no context": (lambda: make_prompt_cache(model), 0),
                "copied": (lambda stock=stock: stock, sum(cache.nbytes for cache in stock)),
                "dense": (dense.fork, dense.nbytes),
                "packed": (packed.fork, packed.nbytes),
            }
            for name, (fork, nbytes) in ways.items():
                with enabled(model):
                    try:
                        milliseconds, more = step(model, [fork() for _ in range(rows)], vocabulary)
                    except RuntimeError as error:
                        print(json.dumps({"tokens": tokens, "rows": rows, "way": name, "failed": str(error)[:60]}))
                        continue
                    finally:
                        mx.clear_cache()
                memory = (weights + nbytes + more) / 1e9
                figures = {"step_ms": round(milliseconds, 2), "memory_GB": round(memory, 1)}
                print(json.dumps({"tokens": tokens, "rows": rows, "way": name, **figures}), flush=True)


if __name__ == "__main__":
    main()
