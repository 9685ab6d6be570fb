"""Writes the demo job with as many queries a document as wanted: its own, asked again under other ids.

    python -m benches.questions FOLDER [--queries 32] [--batch-size 32]
    pipeline bench FOLDER/job.yaml --documents 8 --naive-queries 4

A query asked twice is answered twice by everyone: nobody compared looks for the same text. The summary, which has the
longest answer, comes last, so that it is not among the few that the slowest contender answers.
"""

from __future__ import annotations

import argparse
from itertools import cycle, islice
from pathlib import Path

import yaml

DEMO = Path(__file__).resolve().parent.parent / "jobs" / "summarize.yaml"


def write(folder: Path, queries: int, batch_size: int) -> Path:
    """Write the job file; returns its path."""
    job = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    summary, *own = job["queries"]
    own.append(summary)
    job["queries"] = [
        {**query, "id": f"{query['id']}-{number // len(own) + 1}"}
        for number, query in enumerate(islice(cycle(own), queries))
    ]
    job["model"] = str(DEMO.parent / job["model"])
    job["documents"]["path"] = str(DEMO.parent / job["documents"]["path"])
    job["generation"]["batch_size"] = batch_size
    job["cache"]["dir"], job["output"]["path"] = "cache", "out/answers.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    return path


def main() -> None:
    """Write the job and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    print(write(arguments.folder, arguments.queries, arguments.batch_size))


if __name__ == "__main__":
    main()
