"""The review job: a folder of texts and a file of questions, planned as it stands."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.job.job import Query
from tests import ROOT
from tests.pipeline.command_line import invoke

JOBS = ROOT / "jobs"


def test_contracts_of_one_s_own_are_asked_every_question(tmp_path: Path) -> None:
    contracts = tmp_path / "contracts"
    contracts.mkdir()
    for name in ("lease.md", "supply.md"):
        (contracts / name).write_text(f"# {name}\n\nThis agreement is made between the parties named below.\n" * 20)
    questions = [json.loads(line) for line in (JOBS / "review" / "questions.jsonl").read_text().splitlines()]
    override = ["--set", f"documents.path={contracts}", "--set", f"model={JOBS / 'demo' / 'model'}"]
    override += ["--set", f"cache.dir={tmp_path / 'cache'}", "--set", f"output.path={tmp_path / 'review.parquet'}"]
    result = invoke("plan", JOBS / "review.yaml", *override, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["status"]["documents"] == 2
    assert plan["status"]["rows"] == 2 * len(questions)


def test_every_question_asks_for_evidence_and_three_have_choices() -> None:
    queries = [
        Query.model_validate_json(line) for line in (JOBS / "review" / "questions.jsonl").read_text().splitlines()
    ]
    assert {query.evidence for query in queries} == {1}
    assert sum(query.choices is not None for query in queries) == 3
