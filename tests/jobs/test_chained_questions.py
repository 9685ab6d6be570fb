"""Questions that use answers, on the demo's documents and with its model: held against the gold answers."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import yaml

from tests import ROOT
from tests.pipeline.command_line import invoke

DEMO = ROOT / "jobs" / "demo"
GOLD = {
    (row["document_id"], row["query_id"]): row["answer"] for row in pq.read_table(DEMO / "gold.parquet").to_pylist()
}
PROJECTS = {"pilot scheme": "pilot", "supplier review": "supplier-review"}
QUERIES = [
    {"id": "summary", "text": "Summarize the decisions.", "max_tokens": 48},
    {"id": "owner", "text": "Who owns the {{ answers.project }}?", "when": "answers.summary | length > 9"},
    {"id": "project", "text": "Which project is it?", "choices": list(PROJECTS)},
    {
        "id": "budget",
        "text": "How much was approved for the {{ answers.project }}?",
        "when": "answers.project == 'pilot scheme'",
    },
    {"id": "nobody", "text": "Who is {{ answers.owner }}?", "when": "answers.owner in answers.summary"},
]


def right_and_asked(folder: Path, *options: str) -> tuple[int, int]:
    """Run the job; return how many answers to the questions that use an answer are right, and how many there are."""
    job = {
        "model": str(DEMO / "model"),
        "documents": {"path": str(DEMO / "minutes.parquet")},
        "prompt": {"system": "You answer from the document only."},
        "queries": QUERIES,
        "generation": {"max_tokens": 32},
        "cache": {"dir": str(folder / "cache")},
        "output": {"path": str(folder / "chained.parquet")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    result = invoke("run", folder / "job.yaml", "--quiet", *options)
    assert result.exit_code == 0, result.output
    rows = pq.read_table(folder / "chained.parquet").to_pylist()
    answers = {(row["document_id"], row["query_id"]): row["answer"] for row in rows if row["status"] == "ok"}
    right = [
        answer == GOLD[document_id, f"{PROJECTS[answers[document_id, 'project']]}-{query_id}"]
        for (document_id, query_id), answer in answers.items()
        if query_id in ("owner", "budget")
    ]
    return sum(right), len(right)


def test_a_question_that_uses_an_answer_is_answered_as_the_gold_says(tmp_path: Path) -> None:
    right, asked = right_and_asked(tmp_path, "--limit", "1")
    assert right == asked == 2
