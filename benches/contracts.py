"""Compressed caches on real contracts: a table a length of context, this package's caches beside mlx-lm's.

    python benches/contracts.py --model SMOLLM2 --data CUAD --tokens 1500 4000 7500 --contracts 10 --questions 6

CUAD is a folder with contracts.jsonl.gz (one object with a ``text`` a line) and questions.json (objects with a
``question``). Each contract is cut to the length and prefilled once in full precision; every cache, this package's
saved and loaded in between, is then fed the questions, each with the full-precision model's greedy answer. An H100
takes about a second a row and contract in float32, two CPU cores about ten at 1,500 tokens.

With ``--codings`` the caches are others: scalar and trellis codes, with as many bits in all layers and with bits by
each layer's own effect, which is measured on four more contracts.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.tuning import allocate
from turboquant.fidelity import chat_sample, load_model, table
from turboquant.runtime.blas import load_tuned_blas

if TYPE_CHECKING:
    from turboquant.eval.results import Baseline, Fidelity, Sample

SYSTEM = "You answer from the document only."
ANSWER_TOKENS = 32
PAIRS = ((5, 4), (4, 4), (4, 3), (3, 3), (3, 2), (2, 2))
EVEN = (4, 3, 2)
MEANS = (4, 3, 2.5)  # bits, where they differ by layer
OTHERS, TOKENS_OF_OTHERS, QUESTIONS_OF_OTHERS = 4, 1500, 3  # contracts that say how much each layer matters
SEGMENT = 1024
WITHOUT: dict[str, dict[str, Any]] = {  # what each part of the codec is worth
    "nearest levels": {"query_aware": False},
    "no finer tokens": {"extra_bits": 0},
    "neither, 4 sinks": {"query_aware": False, "extra_bits": 0, "sinks": 4},
}


def contract_samples(
    tokenizer: Any, data: Path, tokens: int, longest: int, contracts: int, questions: int
) -> list[Sample]:
    """The first ``contracts`` that have ``longest`` tokens, cut to ``tokens``: the same ones for every length."""
    asked = json.loads((data / "questions.json").read_text(encoding="utf-8"))
    asked = [entry["question"] for entry in asked[:: len(asked) // questions]][:questions]
    long_enough = (text for text in _texts(data) if len(tokenizer.encode(text)) >= longest)
    return [chat_sample(tokenizer, text, tokens, asked, SYSTEM) for text in itertools.islice(long_enough, contracts)]


def measure_contracts(model: Any, tokenizer: Any, samples: list[Sample], rows: list[Baseline]) -> list[Fidelity]:
    """Each row's figures; progress goes to stderr."""
    from turboquant.eval.divergence import measure

    started = time.monotonic()
    return measure(
        model,
        samples,
        rows,
        answer_tokens=ANSWER_TOKENS,
        stop=tokenizer.eos_token_ids,
        verify=False,
        batched=True,
        on_step=lambda step: print(f"{time.monotonic() - started:5.0f} s  {step}", file=sys.stderr, flush=True),
    )


def _texts(data: Path) -> Iterator[str]:
    with gzip.open(data / "contracts.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _rows(affine_bits: list[int]) -> list[Baseline]:
    from turboquant.eval.baselines import affine, exact, in_segments, streaming
    from turboquant.quant.cache_codec import CacheCodec

    rows = [affine(bits) for bits in affine_bits]
    rows += [exact(CacheCodec(keys, values)) for keys, values in PAIRS]
    rows += [exact(CacheCodec(bits, bits, coding="trellis")) for bits in EVEN if bits <= 4]
    for name, settings in WITHOUT.items():
        rows += [replace(exact(CacheCodec(bits, bits, **settings)), name=name) for bits in EVEN]
    rows += [in_segments(CacheCodec(bits, bits), SEGMENT) for bits in EVEN]
    return rows + [streaming(CacheCodec(bits, bits)) for bits in EVEN]


def _rows_of_codings(effects: list[float]) -> list[Baseline]:
    """Both codings, with the same bits in all layers and with bits by layer. effects: of each layer by itself."""
    from turboquant.eval.baselines import exact
    from turboquant.quant import CODINGS
    from turboquant.quant.cache_codec import CacheCodec

    rows = [exact(CacheCodec(bits, bits, coding=coding)) for bits in EVEN for coding in CODINGS]
    for mean in MEANS:
        by_layer = tuple((layer, bits, bits) for layer, bits in enumerate(allocate(effects, mean)))
        rows += [
            replace(exact(CacheCodec(layer_bits=by_layer, coding=coding)), name=f"{coding}, {mean} bits by layer")
            for coding in CODINGS
        ]
    return rows


def effects_of_layers(model: Any, tokenizer: Any, samples: list[Sample]) -> list[float]:
    """The divergence that each layer causes alone, with 3 bits."""
    from turboquant.eval.baselines import exact
    from turboquant.quant.cache_codec import CacheCodec

    alone = [exact(CacheCodec(16, 16, layer_bits=((layer, 3, 3),))) for layer in range(len(model.layers))]
    return [row.kl for row in measure_contracts(model, tokenizer, samples, alone)]


def add_key_bias(model: Any, times: float) -> None:
    """Give all keys a bias so many times as long as they are, as Qwen2.5's have, in the pair that RoPE turns least."""
    import mlx.core as mx

    for layer in model.layers:
        attention = layer.self_attn
        weight = attention.k_proj.weight * layer.input_layernorm.weight
        heads = weight.reshape(attention.n_kv_heads, -1, weight.shape[-1])  # heads x head_dim x hidden_size
        length = mx.linalg.norm(heads.astype(mx.float32).reshape(len(heads), -1), axis=1)
        head_dim = heads.shape[1]
        slowest = (mx.arange(head_dim) % (head_dim // 2) == head_dim // 2 - 1) / math.sqrt(2)
        attention.k_proj.bias = (times * length[:, None] * slowest).reshape(-1).astype(weight.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure compressed caches on real contracts.")
    parser.add_argument("--model", required=True, help="a model folder with a chat template")
    parser.add_argument("--data", required=True, type=Path, help="the folder of contracts and questions")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1500, 4000, 7500], help="lengths of context")
    parser.add_argument("--contracts", type=int, default=10)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--mlx-kv-bits", nargs="*", type=int, default=[8, 4, 3, 2], help="mlx-lm's own quantised cache")
    parser.add_argument("--codings", action="store_true", help="scalar and trellis codes, also by layer, instead")
    parser.add_argument("--key-bias", type=float, help="first add a bias so many times as long as keys are")
    parser.add_argument("--half", action="store_true", help="keep the weights as they are, not float32")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    load_tuned_blas()
    model, tokenizer = load_model(arguments.model)
    if not arguments.half:
        import mlx.core as mx

        model.set_dtype(mx.float32)
    if arguments.key_bias:
        add_key_bias(model, arguments.key_bias)
    longest, contracts = max(arguments.tokens), arguments.contracts
    if arguments.codings:
        tuned_on = contract_samples(
            tokenizer, arguments.data, TOKENS_OF_OTHERS, longest, contracts + OTHERS, QUESTIONS_OF_OTHERS
        )[contracts:]
        rows = _rows_of_codings(effects_of_layers(model, tokenizer, tuned_on))
    else:
        rows = _rows(arguments.mlx_kv_bits)
    everything = []
    for tokens in arguments.tokens:
        samples = contract_samples(tokenizer, arguments.data, tokens, longest, contracts, arguments.questions)
        figures = measure_contracts(model, tokenizer, samples, rows)
        print(f"# {tokens} tokens, {len(samples)} contracts\n\n{table(figures)}\n", flush=True)
        everything += [{"tokens": tokens, **asdict(row)} for row in figures]
        if arguments.json:
            arguments.json.write_text(json.dumps(everything, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
