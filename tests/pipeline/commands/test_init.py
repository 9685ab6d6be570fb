"""`init`: columns are guessed, missing values are asked for, and the job file is right and complete."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml

from pipeline.commands.console import errors_explained
from pipeline.commands.init import guess_columns
from pipeline.job.job import Job, QueryTable
from pipeline.job.job_file import load_job
from pipeline.job.job_schema import KEYS, job_schema
from tests.pipeline.command_line import ROOT, error_of, in_terminal, invoke
from tests.pipeline.files.formatted import pdf
from tests.pipeline.workplace import Workplace

LONG = ["A long text. " * 20, "Another long text. " * 20, "A third. " * 20]


def written(folder: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), folder / "papers.parquet")
    return str(folder / "papers.parquet")


# ---- columns


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"text": LONG, "id": ["a", "b", "c"]}, ("id", "text")),
        ({"page": LONG, "number": [1, 2, 3], "title": ["x", "y", "z"]}, ("number", "page")),
        ({"html": [text * 2 for text in LONG], "Body": LONG, "URL": ["x", "y", "z"]}, ("URL", "Body")),
        ({"id": [1, 1, 2], "doc_id": [1, 2, 3], "content": LONG}, ("doc_id", "content")),
        ({"id": [None, "a", "b"], "name": ["x", "y", "z"], "note": [None, *LONG[1:]]}, ("name", "note")),
        ({"Doc No.": [3, 2, 1], "Full Text": LONG}, ("Doc No.", "Full Text")),
        ({"score": [0.1, 0.2, 0.3], "flag": [True, False, True], "key": [3, 2, 1], "a": LONG}, ("key", "a")),
    ],
)
def test_columns_are_guessed(tmp_path: Path, columns: dict[str, Any], found: tuple[str, str]) -> None:
    assert guess_columns(written(tmp_path, **columns)) == found


def test_columns_of_json_lines_are_guessed(tmp_path: Path) -> None:
    lines = [{"key": n, "tags": ["x"], "body": text, "note": "y"} for n, text in enumerate(LONG)]
    (tmp_path / "papers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert guess_columns(str(tmp_path / "papers.jsonl")) == ("key", "body")


def test_ids_of_mixed_types_are_ids_and_no_texts(tmp_path: Path) -> None:
    lines = [{"id": each, "body": text} for each, text in zip(["a", 1, 2], LONG, strict=True)]
    (tmp_path / "papers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = invoke("init", tmp_path / "papers.jsonl", tmp_path / "job.yaml", "--query", "Who?", "--model", "a/b")
    assert result.exit_code == 0, result.output
    job = load_job(tmp_path / "job.yaml")
    assert (job.documents.id, job.documents.text) == ("id", "body")
    (tmp_path / "papers.jsonl").write_text('{"id": "1", "no": 1, "body": "x"}\n{"id": 1, "no": 2, "body": "y"}\n')
    assert guess_columns(str(tmp_path / "papers.jsonl")) == ("no", "body")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": LONG}, "no column looks like ids, each its own: say --id; there are: text"),
        ({"id": [1, 2, 3]}, "no column looks like texts: say --text; there are: id"),
        ({"id": pa.array([], pa.string())}, "there are: no rows"),
    ],
)
def test_columns_that_cannot_be_guessed(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    assert words in error_of(invoke("init", written(tmp_path, **columns), tmp_path / "job.yaml"))
    assert not (tmp_path / "job.yaml").exists()


# ---- the file


def test_the_written_job_can_be_run(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace.folder)
    (workplace.folder / "model").symlink_to(workplace.model)
    questions = ["--query", "What did the board decide?", "--query", 'Who "signed": and when? #1', "--query", "???"]
    shown = invoke("init", "docs.parquet", "jobs/first.yaml", "--model", "model", *questions)
    assert shown.stdout.splitlines() == ["jobs/first.yaml", "next: pipeline plan jobs/first.yaml"]
    job = load_job(Path("jobs/first.yaml"))
    assert (job.name, job.documents.path, job.model) == (
        "first",
        str(workplace.folder / "docs.parquet"),
        str(workplace.folder / "model"),
    )
    assert [query.id for query in job.queries] == ["what-did-the-board-decide", "who-signed-and-when-1", "query-a03b22"]
    assert [query.text for query in job.queries] == questions[1::2]
    assert invoke("run", "jobs/first.yaml", "--quiet", "--set", "generation.max_tokens=3").exit_code == 0
    assert pq.read_table("jobs/out/first.parquet").num_rows == 9


def test_every_key_is_shown_with_its_default_and_meaning(tmp_path: Path) -> None:
    documents, file = written(tmp_path, id=[1, 2, 3], page=LONG), tmp_path / "first.yaml"
    assert invoke("init", documents, file).exit_code == 0
    head, *lines = file.read_text().splitlines()
    assert head == "# yaml-language-server: $schema=pipeline.schema.json"
    assert json.loads((tmp_path / "pipeline.schema.json").read_text()) == job_schema()
    for key, meaning in KEYS.items():
        if not key.startswith("queries table."):
            named = f"{key.rpartition('.')[2]}:"
            assert any(named in line and line.endswith(f"# {meaning}") for line in lines), key
    whole = "\n".join(line.removeprefix("# ").replace("#  ", "  ", 1) for line in lines[2:])
    (tmp_path / "whole.yaml").write_text(whole)
    assert load_job(tmp_path / "whole.yaml") == load_job(file)


def test_missing_values_are_asked_for_on_a_terminal(workplace: Workplace) -> None:
    file = workplace.folder / "asked.yaml"
    documents = written(workplace.folder, id=[1, 2, 3], other=[4, 5, 6], page=LONG)
    typed = f"other\n\n{workplace.model}\nWho signed?\nWhen?\n\n"
    screen = "\n".join(in_terminal(100, "init", documents, file, typed=typed))
    for question in (
        "Column of ids [id]: ",
        "Column of texts [page]: ",
        "Model, a folder",
        "First question [Summarize",
        "Another one, or Enter: ",
    ):
        assert question in screen
    job = load_job(file)
    assert (job.documents.id, job.documents.text, job.prompt.context) == ("other", "page", "{{ text }}")
    assert (job.model, [query.text for query in job.queries]) == (str(workplace.model), ["Who signed?", "When?"])
    given = ("--id", "id", "--text", "page", "--model", workplace.model, "--query", "Who?", "--force")
    assert "[" not in "\n".join(in_terminal(100, "init", documents, file, *given))
    assert load_job(file).queries[0].text == "Who?"


@pytest.mark.parametrize("name", ["a.md", "a.pdf"])
def test_of_documents_that_are_files_no_columns_are_asked_for(workplace: Workplace, name: str) -> None:
    if name == "a.pdf":
        pytest.importorskip("pypdfium2", reason="the extra `documents` is not installed")
    (workplace.folder / "papers").mkdir()
    (workplace.folder / "papers" / name).write_bytes(pdf("It began.") if name == "a.pdf" else b"It began.")
    file = workplace.folder / "asked.yaml"
    screen = "\n".join(
        in_terminal(100, "init", workplace.folder / "papers", file, typed=f"{workplace.model}\nWho?\n\n")
    )
    assert "Column" not in screen
    assert "Model, a folder" in screen
    assert [query.text for query in load_job(file).queries] == ["Who?"]


def test_without_an_answer_no_file_is_written(tmp_path: Path) -> None:
    documents = written(tmp_path, id=[1, 2, 3], page=LONG)
    screen = in_terminal(100, "init", documents, tmp_path / "job.yaml", typed="\x04", code=1)
    assert screen[-1].endswith("Aborted!")
    assert not (tmp_path / "job.yaml").exists()


def test_ctrl_c_at_a_question_has_the_exit_code_of_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.StringIO()
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(stdin, "readline", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(typer.Exit) as ended, errors_explained(debug=False, computes=False):
        typer.prompt("Model")
    assert ended.value.exit_code == 130


def test_a_job_file_that_exists_is_kept(workplace: Workplace) -> None:
    before = workplace.job_file.read_text()
    documents = workplace.folder / "docs.parquet"
    line = error_of(invoke("init", documents, workplace.job_file))
    assert line == f"{workplace.job_file}: exists already; --force replaces it"
    assert workplace.job_file.read_text() == before
    assert invoke("init", documents, workplace.job_file, "--force").exit_code == 0
    assert workplace.job_file.read_text() != before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "txt"], "documents.text names the column 'txt'"),
        (["--id", "twice"], "documents.id: the id '1' is given twice"),
        (["--model", "nowhere"], "job.yaml: model: there is no folder "),
        (["--query", " "], "job.yaml: queries.0.text is empty"),
    ],
)
def test_a_job_that_would_not_run_is_not_written(tmp_path: Path, options: list[str], words: str) -> None:
    documents = written(tmp_path, id=[1, 2, 3], twice=[1, 2, 1], page=LONG)
    line = error_of(invoke("init", documents, tmp_path / "job.yaml", *options))
    assert words in line
    assert ".tmp-" not in line
    assert [file.name for file in tmp_path.iterdir()] == ["papers.parquet"]


def test_missing_documents_are_an_error(tmp_path: Path) -> None:
    assert "nix.parquet does not exist" in error_of(invoke("init", tmp_path / "nix.parquet", tmp_path / "job.yaml"))


# ---- the schema


def keys(model: Any = Job, prefix: str = "") -> set[str]:
    """Every key that a job file may have."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        found.add(f"{prefix}{name}")
        for kind in models(field.annotation):
            found |= keys(kind, f"{prefix}{name}{' table' if kind is QueryTable else ''}.")
    return found


def models(annotation: Any) -> list[Any]:
    """The models that a type contains."""
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for part in get_args(annotation) for model in models(part)]


def test_every_key_has_a_meaning() -> None:
    assert set(KEYS) == keys()


def test_the_schema_fits_job_files_and_nothing_else(workplace: Workplace) -> None:
    validator = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads(invoke("schema").stdout)
    check = validator.Draft202012Validator(schema)
    check.check_schema(schema)
    for file in (workplace.job_file, *ROOT.glob("jobs/*.yaml")):
        check.validate(yaml.safe_load(file.read_text()))
    for section, key, value in (
        ("generation", "max_token", 3),
        ("generation", "max_tokens", "3"),
        ("cache", "key_bits", 7),
        ("documents", "path", None),
    ):
        tree = yaml.safe_load(workplace.job_file.read_text())
        tree.setdefault(section, {})[key] = value
        assert not check.is_valid(tree), key
    assert schema["properties"]["retries"]["description"] == KEYS["retries"]
    assert schema["$defs"]["Query"]["properties"]["stop"]["description"] == KEYS["queries.stop"]
