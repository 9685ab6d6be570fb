"""The needle job: written by its script, run as any job, scored."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests import ROOT, warm
from tests.pipeline.command_line import invoke

JOBS = ROOT / "jobs"


def needle(*arguments: str | Path) -> str:
    return str(warm.run([sys.executable, JOBS / "needle.py", *arguments], check=True).stdout)


def test_codes_are_asked_for_and_counted(tmp_path: Path) -> None:
    assert "next: pipeline run" in needle(tmp_path, "--model", JOBS / "demo" / "model", "--tokens", "150", "300")
    result = invoke("run", tmp_path / "job.yaml", "--set", "generation.max_tokens=4")
    assert result.exit_code == 0, result.output
    asked = pq.read_table(tmp_path / "queries.parquet").to_pylist()
    answers = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    pairs = [(row["document"], row["id"]) for row in asked]
    assert [(row["document_id"], row["query_id"]) for row in answers] == pairs
    assert len(pairs) == 2 * 4 * 5
    documents = {row["id"]: row["text"] for row in pq.read_table(tmp_path / "documents.parquet").to_pylist()}
    assert all(documents[row["document"]].count(f"is {row['answer']}.") == 1 for row in asked)
    right = [{"document_id": r["document"], "query_id": r["id"], "answer": f"It is {r['answer']}."} for r in asked]
    right[0]["answer"] = "It is 7."
    pq.write_table(pa.Table.from_pylist(right), tmp_path / "right.parquet")
    lines = needle(tmp_path, "--score", tmp_path / "answers.parquet", tmp_path / "right.parquet").splitlines()
    assert lines[0].split() == ["answers.parquet", "right.parquet"]
    shares = {line.split("  ")[0]: line.split()[-3:] for line in lines[1:]}
    assert shares["150"] == ["19", "of", "20"]
    assert shares["300"] == ["20", "of", "20"]
    assert shares["depth 5%"] == ["7", "of", "8"]
