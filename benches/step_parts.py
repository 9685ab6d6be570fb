"""What a decoding step on a CPU takes beside its parts: the model without a context, and attention to the context.

    python -m benches.step_parts --model FOLDER [--tokens 2000] [--rows 1 8 32]

Rows share one dense context of random tokens. "step" is a whole step as a run does it. "model" is the same step of rows
without a context, with its product by the vocabulary, sampling and log-probabilities. "attention" is a layer's
attention to the context alone, times the layers. Medians, in milliseconds. What "step" takes beyond both is lost
between them. OPENBLAS_NUM_THREADS sets the number of threads: a run with a process for each core has one in each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from benches.steps import random_tokens, step


def attention(layers: list[Any], rows: int, n_heads: int, repeats: int = 7) -> float:
    """Return how long all layers' attention to the context takes for so many rows of one query, in milliseconds."""
    import mlx.core as mx

    from turboquant.attention.dispatch import attend_past

    dim = layers[0].keys.shape[-1]
    queries = mx.random.normal((rows, n_heads, 1, dim))
    mx.eval(queries)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for layer in layers:
            mx.eval(attend_past(queries, layer, dim**-0.5).output)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def main() -> None:
    """Print a JSON object for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    from turboquant.runtime.blas import load_tuned_blas

    blas = load_tuned_blas()

    from mlx_lm.models.cache import make_prompt_cache

    from pipeline.models.loading import load_model
    from turboquant import CacheCodec, enabled, prefill
    from turboquant.caches.prefix import make_resident
    from turboquant.mlx_lm.cpu_functions import numpy_functions

    loaded = load_model(arguments.model)
    vocabulary, n_heads = int(loaded.config["vocab_size"]), int(loaded.config["num_attention_heads"])
    packed = prefill(loaded.model, random_tokens(arguments.tokens, vocabulary, -1), CacheCodec(), 512)
    (dense,) = make_resident([packed], "dense")
    for rows in arguments.rows:
        with enabled(loaded.model), numpy_functions(loaded.model):
            whole, _ = step(loaded.model, [dense.fork() for _ in range(rows)], vocabulary)
            model, _ = step(loaded.model, [make_prompt_cache(loaded.model) for _ in range(rows)], vocabulary)
        context = attention(list(dense.layers), rows, n_heads)
        times = {"step_ms": whole, "model_ms": model, "attention_ms": context}
        row = {"tokens": arguments.tokens, "rows": rows} | {name: round(ms, 1) for name, ms in times.items()}
        print(json.dumps(row | {"blas": blas.name, "threads": blas.threads}), flush=True)


if __name__ == "__main__":
    main()
