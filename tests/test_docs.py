"""What README and docs say to type exists, and what can be tried here does what they say."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from pydantic import BaseModel

from benches.all import ALL
from docs import reference
from pipeline.cli import app
from pipeline.job.job import Generation, Job, QueryTable
from pipeline.job.job_file import load_job
from pipeline.output.rows import SCHEMA
from tests import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHERS = {
    "--turbo-kv-bits",
    "--parsable",
    "--array",
    "--gpus",
    "--wrap",
    "--dependency",
    "--check",
    "--adapter-path",
    "--strict",
    "--head",
    "--generate",
    "--address",
    "--resources",
    "--hostfile",
    "--backend",
}
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code(page: Path) -> list[str]:
    """What a page gives to type: blocks of sh, and what stands between backticks."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in fenced if language == "sh"]
    return blocks + re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    )


def options_of_the_command_line() -> dict[str, set[str]]:
    """The options of each command, by its name."""

    def options(command: Any) -> set[str]:
        found = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        return found.union(*(options(child) for child in getattr(command, "commands", {}).values()))

    group: Any = typer.main.get_command(app)
    return {name: options(command) for name, command in group.commands.items()} | {"": options(group)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    known = options_of_the_command_line()
    for text in code(page):
        for name, rest in re.findall(r"\bpipeline ([a-z]+)\b([^\n'&;|]*)", text):
            assert name in known, text
            assert set(_OPTION.findall(rest)) <= known[name], text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_their_options_exist(page: Path) -> None:
    """`python -m benches.steps`, `benches/kills.py`, `python -m turboquant.bench --json`."""
    for text in code(page):
        for module, path, rest in re.findall(
            r"(?:python -m ((?:benches|turboquant|tests)[\w.]*)|((?:benches|jobs)/[\w/]+\.py))([^\n'&;|]*)", text
        ):
            script = ROOT / (path or f"{module.replace('.', '/')}.py")
            assert script.is_file(), text
            source = text_of(script)
            assert all(f'"{option}"' in source for option in _OPTION.findall(rest) if option not in OF_OTHERS), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_are_spoken_of_exist(page: Path) -> None:
    known = OF_OTHERS.union(*options_of_the_command_line().values())
    sources = "".join(
        text_of(path) for name in ("benches", "turboquant", "jobs") for path in (ROOT / name).rglob("*.py")
    )
    for text in code(page):
        for option in _OPTION.findall(text):
            assert option in known or f'"{option}"' in sources, text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = (page.parent / path) if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(there), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target


def test_the_reference_is_what_the_code_says() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run `python -m docs.reference`"


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert {page.parent.name for page in tmp_path.glob("*/index.html")} >= {"jobs", "reference", "trust"}


def test_the_tests_that_are_spoken_of_exist() -> None:
    names = re.findall(r"`(tests/[\w/.]+)`", text_of(ROOT / "docs" / "features.md"))
    assert len(names) > 30
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_figures_are_taken_again_by_one_command() -> None:
    taken = {word for figures in ALL for command in figures.commands for word in command.split()}
    named = {name for page in PAGES for name in re.findall(r"benches[./](\w+)(?!\w*\()", text_of(page))}
    assert not {name for name in named - {"all", "py"} if f"benches.{name}" not in taken}
    for figures in ALL:
        assert (ROOT / "docs" / figures.page).is_file()


@pytest.mark.parametrize("bench", sorted(file.stem for file in (ROOT / "benches").glob("*.py")))
def test_a_bench_can_be_imported(bench: str) -> None:
    importlib.import_module(f"benches.{bench}")


def test_queries_of_results_in_sql_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    duckdb = pytest.importorskip("duckdb")
    queries = re.findall(r"^```sql\n(.*?)^```", text_of(ROOT / "docs" / "trust.md"), re.MULTILINE | re.DOTALL)
    quotation = {"quote": "two years", "start": 9, "end": 18, "occurrences": 1, "page": None}
    rows: list[dict[str, Any]] = [
        {"query_id": "term", "answer": "two years", "evidence": [quotation]},
        {"query_id": "signed", "answer": "yes", "choice_probabilities": [("yes", 0.8), ("no", 0.2)]},
        {"query_id": "signed", "answer": "no", "choice_probabilities": [("yes", 0.05), ("no", 0.95)]},
    ]
    (tmp_path / "out").mkdir()
    found = [{"document_id": "a", "status": "ok", "fingerprint": ""} | row for row in rows]
    pq.write_table(pa.Table.from_pylist(found, SCHEMA), tmp_path / "out" / "contracts.parquet")
    monkeypatch.chdir(tmp_path)
    assert [[row[:3] for row in duckdb.sql(query).fetchall()] for query in queries] == [
        [("a", "two years", "two years")],
        [("a", "signed", "yes")],
    ]


def test_the_short_job_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text_of(ROOT / "README.md"), re.MULTILINE | re.DOTALL)
    (tmp_path / "job.yaml").write_text(block)
    assert [query.id for query in load_job(tmp_path / "job.yaml").queries] == ["parties", "summary"]


def test_the_job_file_says_all_that_can_be_said(tmp_path: Path) -> None:
    """It is a job, and names every key there is."""
    whole, table, *_ = (
        yaml.safe_load(block)
        for block in re.findall(r"^```yaml\n(.*?)^```", text_of(ROOT / "docs" / "jobs.md"), re.MULTILINE | re.DOTALL)
    )
    (tmp_path / "terms.json").write_text('{"type": "object"}')
    (tmp_path / "adapters").mkdir()
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(whole))
    job = load_job(tmp_path / "job.yaml")
    assert set(whole) == set(Job.model_fields)
    for name in Job.model_fields:
        section = getattr(job, name)
        if isinstance(section, BaseModel):
            assert set(whole[name]) == set(type(section).model_fields), name
    defaults = Generation().model_dump() | {"stop": whole["generation"]["stop"]}  # of which the page says "none"
    assert whole["generation"] == defaults
    assert set(table["queries"]) == set(QueryTable.model_fields)
