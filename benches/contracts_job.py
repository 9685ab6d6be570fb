"""Writes a job on real contracts: so many documents, so many of the data's questions, each context as long as wanted.

    python -m benches.contracts_job FOLDER --data DATA --model MODEL [--contracts 20] [--questions 41] [--tokens 4000]
    pipeline bench FOLDER/job.yaml --documents 20

DATA has ``contracts.jsonl.gz``, a document a line with ``doc_id`` and ``text``, and ``questions.json``, a list with
``qid`` and ``question``. A contract is cut to ``--tokens`` tokens of the model's tokenizer; shorter ones are passed
over. Without ``--tokens`` they are taken whole, where the model reads as much.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

REST = 1000  # tokens left free for the template, a question and its answer


def contracts(data: Path, tokenizer: Any, tokens: int | None, most: int) -> Iterator[tuple[str, str]]:
    """Ids and texts, cut to ``tokens`` tokens, or whole ones of at most ``most``."""
    with gzip.open(data / "contracts.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            found = tokenizer.encode(row["text"], add_special_tokens=False)
            if tokens is None and len(found) <= most:
                yield row["doc_id"], row["text"]
            elif tokens is not None and len(found) >= tokens:
                yield row["doc_id"], tokenizer.decode(found[:tokens])


def main() -> None:
    """Write documents and job, and say where the job is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--contracts", type=int, default=20)
    parser.add_argument("--questions", type=int, default=41)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    model = arguments.model.resolve()
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    found = contracts(arguments.data, tokenizer, arguments.tokens, config["max_position_embeddings"] - REST)
    rows = [{"id": id_, "text": text} for (id_, text), _ in zip(found, range(arguments.contracts), strict=False)]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), arguments.folder / "documents.parquet")
    questions = json.loads((arguments.data / "questions.json").read_text(encoding="utf-8"))
    job = {
        "model": str(model),
        "documents": {"path": "documents.parquet"},
        "prompt": {"system": "You answer from the contract only.", "context": "{{ text }}"},
        "queries": [
            {"id": f"q{question['qid']}", "text": question["question"]} for question in questions[: arguments.questions]
        ],
        "generation": {"max_tokens": arguments.max_tokens, "batch_size": max(16, arguments.questions)},
        "cache": {"dir": "cache"},
        "output": {"path": "out/answers.parquet"},
    }
    path = arguments.folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    print(f"{path}: {len(rows)} contracts, {len(job['queries'])} questions")


if __name__ == "__main__":
    main()
