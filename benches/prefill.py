"""Prefill on this machine: mlx-lm's own caches and attention against ours, on the same BLAS and threads.

    python -m benches.prefill --model smollm2 --text CONTRACT [--tokens 4000] [--rounds 3]

Both in turn in one process, the order changing with each round; the best round of each counts. Ours is told without
and with what encoding the finished context takes. "gflop_per_s" counts the operations of the prefill's matrix products
only; "blas_gflop_per_s" is what the BLAS reaches in a product of two 2,048 x 2,048 matrices, in the same process. The
logits of the last tokens are compared, too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHECKED = 64  # last tokens whose logits are compared


def measure(model: Any, tokens: Sequence[int], rounds: int) -> dict[str, float]:
    """Best seconds, by what was done."""
    from mlx_lm.models.cache import make_prompt_cache

    from pipeline.execution.prefixes import CPU_CHUNK
    from turboquant import CacheCodec, enabled, prefill
    from turboquant.caches.prefix import feed, prefill_caches
    from turboquant.mlx_lm.cpu_functions import numpy_functions
    from turboquant.mlx_lm.families import explain

    def stock(chunk: int) -> None:
        feed(model, make_prompt_cache(model), tokens, chunk)

    def ours() -> None:
        caches = prefill_caches(model, len(tokens), explain(model).layers)
        with enabled(model), numpy_functions(model):
            feed(model, caches, tokens, CPU_CHUNK)

    contenders: dict[str, Callable[[], Any]] = {
        "mlx-lm, 2,048 tokens a step (its default)": lambda: stock(2048),
        f"mlx-lm, {CPU_CHUNK} tokens a step": lambda: stock(CPU_CHUNK),
        "ours": ours,
        "ours, encoded": lambda: prefill(model, tokens, CacheCodec(), CPU_CHUNK),
    }
    best = dict.fromkeys(contenders, float("inf"))
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            started = time.perf_counter()
            contenders[name]()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def product_gflop(model: Any, config: Any, tokens: int) -> float:
    """Count the floating-point operations of a prefill's products, with weights and in attention, in billions."""
    from mlx.utils import tree_flatten

    parameters: list[tuple[str, Any]] = tree_flatten(model.layers)
    weights = sum(weight.size for _, weight in parameters if weight.ndim == 2)
    n_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // n_heads
    attention = 2 * len(model.layers) * n_heads * head_dim * tokens * (tokens + 1) / 2  # scores and weighted values
    return float(2 * (weights * tokens + attention) / 1e9)


def logit_difference(model: Any, tokens: Sequence[int]) -> tuple[float, float]:
    """The greatest difference of the last tokens' logits, and the greatest logit."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from turboquant import enabled
    from turboquant.caches.prefix import feed, prefill_caches
    from turboquant.mlx_lm.families import explain

    before, last = tokens[:-CHECKED], mx.array(list(tokens[-CHECKED:]))[None]
    stock = make_prompt_cache(model)
    feed(model, stock, before, 2048)
    expected = model(last, cache=stock)
    caches = prefill_caches(model, len(tokens), explain(model).layers)
    with enabled(model):
        feed(model, caches, before, 512)
        found = model(last, cache=caches)
    return mx.abs(found - expected).max().item(), mx.abs(expected).max().item()


def main() -> None:
    """Print seconds, ratios to mlx-lm's default, and the difference of the logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4000])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    from turboquant.runtime.blas import load_tuned_blas

    blas = load_tuned_blas()
    from pipeline.models.loading import load_model
    from turboquant.runtime.blas import measure_gflops

    loaded = load_model(arguments.model)
    text = loaded.tokenizer.encode(arguments.text.read_text())
    for count in arguments.tokens:
        if len(text) < count:
            parser.error(f"{arguments.text} has only {len(text)} tokens")
        best = measure(loaded.model, text[:count], arguments.rounds)
        base = next(iter(best.values()))
        rate, gflop = measure_gflops(2048, 3), product_gflop(loaded.model, loaded.config, count)
        for name, seconds in best.items():
            measured = {"seconds": round(seconds, 2), "rate_by_mlx_lm": round(base / seconds, 2)}
            share = {"gflop_per_s": round(gflop / seconds), "blas_gflop_per_s": round(rate)}
            print(json.dumps({"tokens": count, "way": name, **measured, **share, "blas": blas.name}), flush=True)
        difference, greatest = logit_difference(loaded.model, text[:count])
        print(json.dumps({"tokens": count, "greatest_difference_of_a_logit": difference, "greatest_logit": greatest}))


if __name__ == "__main__":
    main()
