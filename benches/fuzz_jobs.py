"""Spoils job files in thousands of ways, plans each job, and counts what comes of it.

    python -m benches.fuzz_jobs [--mutations 10000] [--seed 0]

A mutation changes a file's bytes, a word, or a node of its tree. A job that is planned all the same is fine; one in
ten of those is run. The others are to be refused by one line on stderr and exit code 2, with nothing written. No
model is downloaded: a name of one that is not here is refused as well.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from typer.testing import CliRunner, Result

from benches.fuzz_files import PIECES, change, spoil
from benches.tiny import Place, text_of, write_model
from pipeline.cli import app
from pipeline.errors import ModelError
from pipeline.execution.runner import Runner
from pipeline.job.job_file import load_job
from pipeline.progress import RunObserver

LINES = [{"id": f"d{number}", "text": text_of(number, 3), "year": 2020 + number} for number in range(3)]
ASKED = [{"document": f"d{number}", "id": "q", "text": "Why?", "max_tokens": 2} for number in (2, 0)]
SECTIONS: list[dict[str, Any]] = [
    {},
    {
        "documents": {
            "path": "lines.jsonl",
            "where": "year > 2020 and id != 'x'",
            "limit": 2,
            "too_long": "truncate",
        },
        "queries": {"path": "asked.parquet", "id": "id", "text": "text", "document_id": "document"},
        "prompt": {"system": None, "context": "{{ year }}: {{ text }}"},
    },
    {
        "documents": {"path": "texts/*.md", "id": "id", "text": "text", "too_long": "error"},
        "queries": {"path": "asked.parquet"},
        "generation": {"max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["\n"], "batch_size": 2},
        "cache": {"dir": "cache", "key_bits": 3, "layer_bits": {0: 8}, "prefill": "streaming", "budget": "1GB"},
    },
]
WORDS = [*PIECES, "documents.path", "*.parquet", "texts", "{{ text }}", "{{", "text >", "../..", "~", "s3://x/y", "\n"]
RUN_ONE_IN = 10


def fuzz(mutations: int, seed: int, folder: Path) -> Counter[str]:
    """What came of so many mutations, by outcome."""
    logging.getLogger().addHandler(logging.NullHandler())  # or commands would log to a stream that is gone
    rng = random.Random(seed)
    jobs = write_jobs(folder)
    counts: Counter[str] = Counter()
    with patch("pipeline.models.loading._snapshot", not_here):
        for number in range(mutations):
            content = mutated(rng.choice(jobs), jobs, rng)
            counts[outcome(content, folder / "job.yaml", number)] += 1
    return counts


def not_here(repo: str, revision: str | None) -> Path:
    """What becomes of a model that would have to be downloaded."""
    raise ModelError(f"model {repo}: there is no network")


def write_jobs(folder: Path) -> list[bytes]:
    """Write a model, documents and queries; returns the good job files."""
    model = write_model(folder / "model")
    (folder / "texts").mkdir()
    for line in LINES:
        (folder / "texts" / f"{line['id']}.md").write_text(line["text"])
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    unique = [{**row, "id": f"q{number}"} for number, row in enumerate(ASKED)]
    pq.write_table(pa.Table.from_pylist(unique), folder / "asked.parquet")
    jobs: list[bytes] = []
    for sections in SECTIONS:
        place = Place(folder, model, sections=sections)
        jobs.append(place.write({line["id"]: line["text"] for line in LINES}).read_bytes())
        (folder / "job.yaml").write_bytes(jobs[-1])
        assert plan(folder / "job.yaml").exit_code == 0
    return jobs


def mutated(good: bytes, jobs: list[bytes], rng: random.Random) -> bytes:
    """A job file with something changed."""
    way = rng.random()
    if way < 0.3:
        return spoil({"job": good}, rng)["job"]
    if way < 0.5:
        words = list(re.finditer(rb"[\w.*/{}]+", good))
        place, other = rng.choice(words), rng.choice(re.findall(rb"[\w.*/{}]+", rng.choice(jobs)))
        return good[: place.start()] + other + good[place.end() :]
    tree = yaml.safe_load(good)
    for _ in range(rng.choice((1, 1, 2))):
        tree = change(tree, rng, WORDS)
    return yaml.safe_dump(tree).encode()


def plan(job: Path) -> Result:
    """Plan a job as a user does."""
    return CliRunner().invoke(app, ["plan", str(job)])


def outcome(content: bytes, job: Path, number: int) -> str:
    """What comes of a job file's content; what should not is printed."""
    before = listing(job.parent)
    job.write_bytes(content)
    result = plan(job)
    lines = result.stderr.splitlines()
    said = "planned"
    if result.exit_code == 2 and not result.stdout and len(lines) == 1 and lines[0].startswith("error: "):
        said = "refused"
    elif result.exit_code != 0:
        said = "not clear"
    if listing(job.parent) != before:
        said = "wrote something"
    if said == "planned" and number % RUN_ONE_IN == 0:
        said = run(job)
    if said not in ("planned", "refused", "run"):
        print(f"{said}: {content!r}\n{result.exit_code}: {result.stdout}{result.stderr}", file=sys.stderr)
    return said


def run(job: Path) -> str:
    """What comes of running a job that was planned, if it writes here.

    What it wrote is removed: a plan refuses a job that asks for less than an earlier result has.
    """
    loaded = load_job(job)
    if not all(path.is_relative_to(job.parent) for path in (loaded.result_file, loaded.cache.dir)):
        return "planned"
    before = listing(job.parent)
    try:
        Runner(loaded, RunObserver()).run()
    except Exception as error:
        return f"run, and {type(error).__name__}: {error}"
    finally:
        for path in sorted(map(Path, listing(job.parent) - before), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    return "run"


def listing(folder: Path) -> set[str]:
    """The files of a folder."""
    return {str(path) for path in folder.rglob("*")}


def main() -> int:
    """Run the command; returns 1 where a job was neither fine nor refused clearly."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(options.mutations, options.seed, Path(folder))
    for name, count in counts.most_common():
        print(json.dumps({"outcome": name, "count": count}))
    return 1 if set(counts) - {"planned", "refused", "run"} else 0


if __name__ == "__main__":
    sys.exit(main())
