"""Compressed caches on real contracts: a table a length of context, this package's caches beside mlx-lm's.

    python benches/contracts.py --model SMOLLM2 --data CUAD --tokens 1500 4000 7500 --contracts 10 --questions 6

CUAD is a folder with contracts.jsonl.gz (one object with a ``text`` a line) and questions.json (objects with a
``question``). Each contract is cut to the length and prefilled once in full precision; every cache, this package's
saved and loaded in between, is then fed the questions, each with the full-precision model's greedy answer. An H100
takes about a second a row and contract in float32, two CPU cores about ten at 1,500 tokens.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboquant.fidelity import chat_sample, load_model, table
from turboquant.runtime.blas import load_tuned_blas

if TYPE_CHECKING:
    from turboquant.eval.results import Baseline, Fidelity, Sample

SYSTEM = "You answer from the document only."
ANSWER_TOKENS = 32
PAIRS = ((5, 4), (4, 4), (4, 3), (3, 3), (3, 2), (2, 2))
EVEN = (4, 3, 2)
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure compressed caches on real contracts.")
    parser.add_argument("--model", required=True, help="a model folder with a chat template")
    parser.add_argument("--data", required=True, type=Path, help="the folder of contracts and questions")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1500, 4000, 7500], help="lengths of context")
    parser.add_argument("--contracts", type=int, default=10)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--mlx-kv-bits", nargs="*", type=int, default=[8, 4, 3, 2], help="mlx-lm's own quantised cache")
    parser.add_argument("--half", action="store_true", help="keep the weights as they are, not float32")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    load_tuned_blas()
    model, tokenizer = load_model(arguments.model)
    if not arguments.half:
        import mlx.core as mx

        model.set_dtype(mx.float32)
    rows, everything = _rows(arguments.mlx_kv_bits), []
    for tokens in arguments.tokens:
        samples = contract_samples(
            tokenizer, arguments.data, tokens, max(arguments.tokens), arguments.contracts, arguments.questions
        )
        figures = measure_contracts(model, tokenizer, samples, rows)
        print(f"# {tokens} tokens, {len(samples)} contracts\n\n{table(figures)}\n", flush=True)
        everything += [{"tokens": tokens, **asdict(row)} for row in figures]
        if arguments.json:
            arguments.json.write_text(json.dumps(everything, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
