"""What planning costs: seconds and peak memory of ``pipeline plan`` on 1,000, 10,000 and 100,000 short documents.

    python benches/plan.py [--documents 1000 10000 100000] [--words 225] [--command plan|status]

The documents are made-up words, the same ones every time, in one Parquet file in a temporary folder; the model is the
demo's, with three queries. Each plan is a process of its own, so its peak memory is its own too; importing mlx-lm and
transformers is part of both figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

MODEL = Path(__file__).resolve().parent.parent / "jobs" / "demo" / "model"
SYLLABLES = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u", "an", "er", "il", "on", "us")]
QUERIES = ["Summarize the decisions.", "Who owns the supplier review?", "When does the pilot scheme start?"]
ROWS_PER_TABLE = 1000


def main() -> None:
    """Print a line of JSON for each number of documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--words", type=int, default=225, help="on average; from two thirds to four thirds of it")
    parser.add_argument("--command", choices=("plan", "status"), default="plan")
    arguments = parser.parse_args()
    for count in arguments.documents:
        with tempfile.TemporaryDirectory() as folder:
            characters = write_documents(Path(folder) / "documents.parquet", count, arguments.words)
            seconds, megabytes, output = measure(arguments.command, write_job(Path(folder)))
        found = json.loads(output)
        counted = {name: found[name] for name in ("tokens", "misses", "estimated", "left") if name in found}
        measured = {"seconds": round(seconds, 1), "peak_MB": round(megabytes), "counted": counted}
        print(json.dumps({"documents": count, "characters": characters, **measured}), flush=True)


def write_documents(path: Path, count: int, words: int) -> int:
    """Write the documents; returns their characters."""
    source = random.Random(0)
    vocabulary = ["".join(source.choices(SYLLABLES, k=source.choice((1, 2, 2, 3, 4)))) for _ in range(20_000)]
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    characters = 0
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, count, ROWS_PER_TABLE):
            rows = range(start, min(start + ROWS_PER_TABLE, count))
            texts = [document(source, vocabulary, words) for _ in rows]
            characters += sum(map(len, texts))
            file.write_table(pa.table({"id": [f"d{row}" for row in rows], "text": texts}, schema=schema))
    return characters


def document(source: random.Random, vocabulary: list[str], words: int) -> str:
    """Sentences of about a dozen words."""
    left, sentences = source.randint(words * 2 // 3, words * 4 // 3), []
    while left > 0:
        length = min(left, source.randint(5, 20))
        sentences.append(" ".join(source.choices(vocabulary, k=length)).capitalize() + ".")
        left -= length
    return " ".join(sentences)


def write_job(folder: Path) -> Path:
    """A job with three queries on the documents."""
    path = folder / "job.yaml"
    job = {
        "model": str(MODEL),
        "documents": {"path": "documents.parquet"},
        "prompt": {"system": "You answer from the document only."},
        "queries": [{"id": f"q{index}", "text": text} for index, text in enumerate(QUERIES)],
        "cache": {"dir": "cache"},
        "output": {"path": "out/answers.parquet"},
    }
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def measure(command: str, job: Path) -> tuple[float, float, str]:
    """Seconds, peak resident megabytes and standard output of one command; raises where it fails."""
    output = job.with_suffix(".json")
    arguments = [sys.executable, "-m", "pipeline.cli", command, str(job), "--json"]
    started = time.monotonic()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
    process = os.posix_spawn(sys.executable, arguments, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, descriptor, 1)])
    os.close(descriptor)
    _, state, usage = os.wait4(process, 0)
    seconds = time.monotonic() - started
    if code := os.waitstatus_to_exitcode(state):
        raise SystemExit(f"pipeline {command} failed with exit code {code}")
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10  # ru_maxrss is in bytes there, in kilobytes elsewhere
    return seconds, usage.ru_maxrss / scale, output.read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
