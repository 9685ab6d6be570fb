"""Writes a job for measuring speed on a GPU: a random model of 380 million parameters, long documents, many queries.

    python -m benches.big FOLDER [--documents 2] [--queries 32] [--tokens 16384] [--max-tokens 64]
        [--billion | --eight-billion]
    pipeline bench FOLDER/job.yaml --documents 2 --queries 32

The model says nothing of sense and hardly ever ends an answer by itself, so all contenders generate the same numbers
of tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from benches.tiny import Place, text_of, write_model

# Heads, layers and widths of models that people run on long contexts; 98 kB of float16 K/V a token.
SIZE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1 << 17,
}
BILLION = {
    **SIZE,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 18,
}  # 1.1 of them, 74 kB a token
EIGHT_BILLION = {
    **SIZE,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 512,  # a multiple of 64: for other numbers MLX compiles one kernel more, for most of a minute
}  # 7.0 of them, since the vocabulary is small, in 4 bits 3.9 GB; 131 kB a token
SENTENCE = 25  # tokens, about


def write(
    folder: Path,
    documents: int,
    queries: int,
    tokens: int,
    max_tokens: int,
    size: dict[str, int],
    quantized_bits: int | None = None,
) -> Path:
    """Write model, documents and job; returns the job file."""
    place = Place(
        folder, write_model(folder / "model", "bfloat16", quantized_bits=quantized_bits, torch_dtype="bfloat16", **size)
    )
    path = place.write({f"d{number}": text_of(number, tokens // SENTENCE) for number in range(documents)}, max_tokens)
    job = yaml.safe_load(path.read_text(encoding="utf-8"))
    job["queries"] = [{"id": f"q{number}", "text": f"{number}: {text_of(number, 1)}"} for number in range(queries)]
    job["generation"]["batch_size"] = queries
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def main() -> None:
    """Write the job and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--max-tokens", type=int, default=64)
    larger = parser.add_mutually_exclusive_group()
    larger.add_argument("--billion", action="store_true", help="a model of 1.1 billion parameters")
    larger.add_argument("--eight-billion", action="store_true", help="the shape of 8B models, in 4 bits")
    arguments = parser.parse_args()
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    size = EIGHT_BILLION if arguments.eight_billion else BILLION if arguments.billion else SIZE
    bits = 4 if arguments.eight_billion else None
    counts = arguments.documents, arguments.queries, arguments.tokens, arguments.max_tokens
    print(write(arguments.folder, *counts, size, bits))


if __name__ == "__main__":
    main()
