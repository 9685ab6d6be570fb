"""The table in docs/jobs.md of what makes rows and prefixes stale: each thing that it names is changed once."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.execution.fingerprint import context_label, job_identity
from pipeline.execution.planner import TaskPlanner
from pipeline.inputs.inputs import Inputs
from pipeline.job.job_file import load_job
from pipeline.job.job_schema import KEYS
from tests import ROOT
from tests.pipeline.workplace import Workplace

Change = Callable[[Workplace], object]


def table() -> dict[str, tuple[str, str]]:
    """What happens to rows and prefixes, by the names in the table's first column."""
    text = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"\| what changes \| rows \| prefixes \|\n(?:\|.*\n)+", text)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]
    return {name: (of_rows, of_prefixes) for what, of_rows, of_prefixes in rows for name in re.findall("`(.*?)`", what)}


TABLE = table()
FILES = [name for name in TABLE if re.search(r"\.(safetensors|json|jinja|model|tiktoken|txt|md|py)$", name)]
SETTINGS = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.5, "seed": 3, "stop": ["x"]}
CODEC = {
    "key_bits": 3,
    "value_bits": 3,
    "layer_bits": {0: 8},
    "sinks": 3,
    "window": 3,
    "extra_bits": 0.5,
    "coding": "trellis",
}
CACHE = {"prefill": "exact", "segment": 600, "dir": "other", "budget": "1GB", "keep": "job", "resident": "packed"}
# Named in the table, and tried in test_encodings.py, or no thing that can be changed here.
ELSEWHERE = {"documents.encoding", "revision", "streaming"}


def change_file(name: str) -> Change:
    """Add a space to a file, which is made if it is not there."""

    def change(place: Workplace) -> None:
        file = place.folder / ("adapter" if "adapter" in name else "model") / name.replace("*", "a")
        file.parent.mkdir(exist_ok=True)
        with file.open("ab") as content:
            content.write(b" ")

    return change


def set_key(path: str, value: Any) -> Change:
    section, _, key = path.rpartition(".")
    return lambda place: (place.tree.setdefault(section, {}) if section else place.tree).update({key: value})


def set_keys(section: str, values: dict[str, Any]) -> dict[str, Change]:
    return {f"{section}.{key}": set_key(f"{section}.{key}", value) for key, value in values.items()}


def set_query(key: str, value: Any) -> Change:
    return lambda place: place.queries[0].update({key: value})


def move(name: str, path: str) -> Change:
    """Move a file or a folder that a key names."""

    def change(place: Workplace) -> None:
        shutil.move(place.folder / name, place.folder / "moved.parquet")
        set_key(path, "moved.parquet")(place)

    return change


CHANGES: dict[str, Change] = {
    **{name: change_file(name) for name in FILES},
    **set_keys("cache", CODEC | CACHE),
    **set_keys(
        "documents",
        {
            "text": "other",
            "id": "same",
            "where": "id != 'd2'",
            "limit": 1,
            "too_long": "truncate",
            "follow_links": False,
        },
    ),
    **set_keys("prompt", {"system": "Be brief.", "context": "{{ text }}!", "special_tokens": "allow"}),
    **{f"queries.{key}": set_query(key, value) for key, value in SETTINGS.items()},
    "16": lambda place: place.tree["cache"].update(key_bits=16, value_bits=16),
    "queries.json_schema": set_query("json_schema", {"type": "object"}),
    "queries.choices": set_query("choices", ["yes", "no"]),
    "queries.evidence": set_query("evidence", 1),
    "queries.samples": lambda place: place.queries[0].update(samples=2, temperature=0.7),
    "queries.text": set_query("text", "Where?"),
    "queries.template": lambda place: place.queries[0].update(text="{{ id }}?", template=True),
    "queries.when": set_query("when", "id != 'd0'"),
    "queries.previous": lambda place: place.queries[1].update(previous=True),
    "queries.check": set_query("check", "len(answer) < 200"),
    "queries.retries": lambda place: place.queries[0].update(check="len(answer) < 200", retries=1),
    "queries.id": lambda place: [query.update(id=f"new {query['id']}") for query in place.queries],
    **set_keys("generation", SETTINGS | {"thinking": "drop", "batch_size": 1}),
    **set_keys(
        "scale",
        {"processes": 2, "ranks": 2, "workers": 2, "num_cpus": 2, "num_gpus": 1, "resources": {"mac": 1}},
    ),
    "model": move("model", "model"),
    "documents.path": move("docs.parquet", "documents.path"),
    **set_keys("output", {"path": "out/b.parquet", "columns": ["other"], "layout": "wide"}),
    "adapter": lambda place: place.tree.pop("adapter"),
    "trust_remote_code": set_key("trust_remote_code", False),
    "name": set_key("name", "another"),
    "retries": set_key("retries", 3),
    "versions": set_key("versions", "redo"),
}


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """A workplace with a model of its own, an adapter, a document that is too long, and further columns."""
    shutil.copytree(workplace.model, workplace.folder / "model")
    for name in ("adapters.safetensors", "adapter_config.json"):
        change_file(name)(workplace)
    workplace.tree |= {"model": "model", "adapter": "adapter", "trust_remote_code": True}
    workplace.tree["cache"]["prefill"] = "streaming"
    texts = [*list(workplace.documents.values())[:2], "Too long for the model. " * 600]
    columns = {"id": ["d0", "d1", "d2"], "same": ["d0", "d1", "d2"], "text": texts}
    pq.write_table(
        pa.table(columns | {"other": [f"Other {text}" for text in texts]}), workplace.folder / "docs.parquet"
    )
    return workplace


def state(place: Workplace) -> tuple[list[str], list[object]]:
    """The fingerprints of all rows in their order, and what the prefixes of all documents are addressed by."""
    place.job_file.write_text(yaml.safe_dump(place.tree | {"queries": place.queries}))
    job = load_job(place.job_file)
    identity, rows, prefixes = job_identity(job), [], []
    planner = TaskPlanner(job, identity)
    for document in Inputs(job).stream():
        task = planner.plan(document, {})
        assert task.rendered is not None
        rows += task.fingerprints.values()
        prefixes.append((asdict(identity), context_label(task.rendered)))
    return rows, prefixes


@pytest.mark.parametrize("name", sorted(set(TABLE) - ELSEWHERE))
def test_the_table_tells_what_a_change_makes_stale(place: Workplace, name: str) -> None:
    if name == "scale.ranks":
        del place.tree["adapter"]  # as ranks have none
    before = state(place)
    CHANGES[name](place)
    after = state(place)
    # A condition or a limit leaves fewer documents, the first ones.
    same = [new == old[: len(new)] for old, new in zip(before, after, strict=True)]
    assert tuple("kept" if each else "again" for each in same) == TABLE[name]


def test_the_table_has_every_key_of_a_job() -> None:
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    assert {key for key in KEYS if "table." not in key} - sections <= set(TABLE)


def fingerprints(place: Workplace, context: str, **columns: str) -> list[str]:
    """The fingerprints of the queries of a document with these columns."""
    place.tree["prompt"] = {"context": context}
    pq.write_table(pa.table({name: [value] for name, value in columns.items()}), place.folder / "docs.parquet")
    return state(place)[0]


@pytest.mark.parametrize("of_document", [False, True])
def test_what_a_check_reads_decides_its_row(place: Workplace, of_document: bool) -> None:
    place.queries = [
        {"id": "a", "text": "How long?", "check": "len(answer) < 200 or id == 'd1'"},
        {"id": "b", "text": "How long?", "check": "len(answer) < longest"},
        {"id": "c", "text": "How long?", "check": "answer in row['other']"},
    ]
    if of_document:
        table = pa.Table.from_pylist([{**query, "document": "d0"} for query in place.queries])
        pq.write_table(table, place.folder / "asked.parquet")
        place.queries = {"path": "asked.parquet", "document_id": "document"}  # type: ignore[assignment]
    columns = {"id": "d0", "text": "A text.", "longest": "200", "other": "x"}
    before = fingerprints(place, "{{ text }}", **columns)
    for changes, same in (
        ({"longest": "3"}, [True, False, True]),
        ({"other": "y"}, [True, True, False]),
        ({"longest": "x", "other": "200"}, [True, False, False]),
    ):
        after = fingerprints(place, "{{ text }}", **{**columns, **changes})
        assert [new == old for new, old in zip(after, before, strict=True)] == same


def test_the_text_decides_quotations_and_checks_of_it_where_a_template_changes_it(place: Workplace) -> None:
    place.queries = [
        {"id": "a", "text": "How long?", "check": "len(answer) < 200"},
        {"id": "b", "text": "How long?", "check": "answer in context"},
        {"id": "c", "text": "How long?", "evidence": True},
        {"id": "d", "text": "How long?", "json_schema": {"properties": {"q": {"x-evidence": True}}}},
    ]
    template, columns = "Paper: {{ text | trim }}", {"id": "d0", "text": "A text."}
    kept = fingerprints(place, "Paper: {{ text }}", **columns)
    assert fingerprints(place, template, **columns) == kept  # the same prompt, in which the text is as it is
    for text in (" A text.", "A text. ", "\n\nA text."):
        after = fingerprints(place, template, **columns | {"text": text})
        assert [new == old for new, old in zip(after, kept, strict=True)] == [True, False, False, False]
