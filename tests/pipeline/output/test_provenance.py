"""A result and its run file name what made them."""

from __future__ import annotations

import json
from datetime import datetime

import pyarrow.parquet as pq
import pytest

from tests.pipeline.command_line import invoke
from tests.pipeline.workplace import Workplace
from turboquant.runtime.versions import package_versions

pytestmark = pytest.mark.usefixtures("here")


def metadata(place: Workplace) -> dict[str, str]:
    raw = pq.read_schema(place.output).metadata
    return {key.decode().removeprefix("pipeline."): value.decode() for key, value in raw.items()}


def test_a_result_names_what_made_it(workplace: Workplace) -> None:
    workplace.save(prompt={"context": "Read: {{ text }}"})
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 0
    found, report = metadata(workplace), workplace.report()
    assert (found["job"], found["model"], found["revision"]) == ("job", str(workplace.model), "null")
    assert (found["adapter"], json.loads(found["prompt"])["context"]) == ("null", "Read: {{ text }}")
    asked = {query["id"]: query for query in json.loads(found["queries"])}
    assert (asked["when"]["text"], asked["when"]["max_tokens"]) == ("When does the lease end?", 3)
    assert asked["who"]["max_tokens"] == 5
    assert json.loads(found["versions"]) == package_versions()
    assert {name: found[name] for name in report["identity"]} == report["identity"]
    for name in ("prompt", "queries", "versions"):
        assert report[name] == json.loads(found[name])
    assert datetime.fromisoformat(report["started"]) <= datetime.fromisoformat(report["updated"])


def test_two_results_can_be_told_apart(workplace: Workplace) -> None:
    workplace.run()
    before = metadata(workplace)
    workplace.run("cache.key_bits=8", "queries.0.temperature=0.5")
    after = metadata(workplace)
    assert {name for name in before if before[name] != after[name]} == {"codec", "queries"}


def test_the_questions_of_a_table_are_named_too(workplace: Workplace) -> None:
    (workplace.folder / "asked.jsonl").write_text('{"id": "a", "text": "Why?"}\n')
    workplace.table = {"path": "asked.jsonl"}
    workplace.run()
    assert json.loads(metadata(workplace)["queries"])[0]["text"] == "Why?"
