"""Which columns the names in templates and conditions are, by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.inputs.documents import stream_documents
from pipeline.inputs.prompts import Renderer, template_columns
from pipeline.job.job import Documents, Prompt
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")

BODIES = ["The board met on the third of May.", "The lease ends in May."]


def write(workplace: Workplace, columns: dict[str, Any], **sections: Any) -> Path:
    """Write documents of these columns, and a job that reads them; the job file."""
    job = workplace.save(**sections)
    pq.write_table(pa.table(columns), workplace.folder / "docs.parquet")
    return job


def fingerprints(workplace: Workplace, job: Path) -> list[str]:
    assert invoke("run", job, "--quiet", "--prune").exit_code == 0
    return [row["fingerprint"] for row in workplace.rows().values()]


def test_text_and_id_are_the_columns_that_documents_names(workplace: Workplace) -> None:
    plain = write(workplace, {"id": ["a", "b"], "text": BODIES}, prompt={"context": "{{ id }}: {{ text }}"})
    expected = fingerprints(workplace, plain)
    columns = {"Doc No.": ["a", "b"], "Full Text": BODIES, "id": [1, 2], "text": ["x", "y"]}
    named = write(workplace, columns, documents={"path": "docs.parquet", "id": "Doc No.", "text": "Full Text"})
    assert json.loads(invoke("status", named, "--json").stdout)["left"] == 0
    assert fingerprints(workplace, named) == expected


@pytest.mark.parametrize(
    "context",
    [
        '{{ row["Full Text"] }}{{ row["text"] }}{{ row.text if false else "" }}',
        '{{ row["Full Text"] }}{{ row }}',
    ],
)
def test_row_is_followed_by_the_name_of_a_column_or_is_a_column(workplace: Workplace, context: str) -> None:
    documents = {"path": "docs.parquet", "text": "Full Text"}
    job = write(workplace, {"id": ["a"], "Full Text": ["x"]}, documents=documents, prompt={"context": context})
    assert error_of(invoke("plan", job)).startswith("prompt.context: row is used both with and without the name")


def test_columns_of_any_name_are_used_by_row(workplace: Workplace) -> None:
    plain = write(workplace, {"id": ["a", "b"], "text": BODIES, "t": [7, 8]}, prompt={"context": "{{ t }}: {{ text }}"})
    expected = fingerprints(workplace, plain)
    columns = {"id": ["a", "b"], "text": BODIES, "Page Count": [7, 8]}
    named = write(workplace, columns, prompt={"context": '{{ row["Page Count"] }}: {{ row["text"] }}'})
    assert fingerprints(workplace, named) == expected
    named = write(workplace, columns, documents={"path": "docs.parquet", "where": 'row["Page Count"] > 7'})
    assert fingerprints(workplace, named) == expected[3:]


def test_a_column_that_is_called_row_keeps_its_name(workplace: Workplace) -> None:
    plain = write(workplace, {"id": ["a"], "text": BODIES[:1], "t": [7]}, prompt={"context": "{{ t }} {{ text }}"})
    expected = fingerprints(workplace, plain)
    columns = {"id": ["a"], "text": BODIES[:1], "row": [7]}
    for context in ("{{ row }} {{ text }}", '{{ row["row"] }} {{ text }}'):
        assert fingerprints(workplace, write(workplace, columns, prompt={"context": context})) == expected


def test_the_text_may_be_used_by_its_own_name(workplace: Workplace) -> None:
    plain = write(workplace, {"id": ["a", "b"], "text": BODIES})
    expected = fingerprints(workplace, plain)
    documents = {"path": "docs.parquet", "text": "body"}
    for context in ("{{ body }}", "{{ text }}", '{{ row["body"] }}', "{% if body %}{{ text }}{% endif %}"):
        job = write(workplace, {"id": ["a", "b"], "body": BODIES}, documents=documents, prompt={"context": context})
        assert fingerprints(workplace, job) == expected


@pytest.mark.parametrize("command", ["run", "plan", "status"])
def test_a_context_without_the_text_is_an_error(workplace: Workplace, command: str) -> None:
    columns = {"id": ["a"], "body": ["x"], "title": ["t"]}
    documents = {"path": "docs.parquet", "text": "body"}
    job = write(workplace, columns, documents=documents, prompt={"context": "{{ title }} {{ id }}"})
    assert error_of(invoke(command, job)) == (
        "prompt.context has none of the text: it uses 'id', 'title', and documents.text names the column 'body'; "
        "write {{ text }} where the text belongs, or name another column as the text"
    )


def test_the_text_that_the_prompt_shows_is_cut(workplace: Workplace) -> None:
    columns = {"id": ["a"], "text": ["short"], "body": ["The board met and decided the budget. " * 900]}
    documents = {"path": "docs.parquet", "text": "body", "too_long": "truncate"}
    for context in ("{{ text }} END", '{{ row["body"] }} END'):
        job = write(workplace, columns, documents=documents, prompt={"context": context})
        result = invoke("run", job)
        assert result.exit_code == 0, result.output
        assert all(row["context_tokens"] > 1800 for row in workplace.rows().values())
        workplace.output.unlink()


_names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)


@settings(deadline=None)
@given(text=_names, key=_names, other=_names)
@example("text", "id", "row")
@example("id", "text", "loop")
@example("body", "row", "text")
@example("true", 'a"b\\', "items")
@example("x}}", "{{ id }}", "😀")
def test_a_column_of_any_name_can_be_used(
    tmp_path_factory: pytest.TempPathFactory, text: str, key: str, other: str
) -> None:
    if len({text, key, other}) < 3 or not text.strip() or not key.strip():
        return
    path = tmp_path_factory.mktemp("names") / "a.parquet"
    pq.write_table(pa.table({text: ["the text"], key: ["the id"], other: ["the other"]}), path)
    documents = Documents(path=str(path), id=key, text=text)
    quoted = [json.dumps(name, ensure_ascii=False) for name in (text, key, other)]
    context = "{{ id }}, {{ text }}, " + ", ".join(f"{{{{ row[{name}] }}}}" for name in quoted)
    prompt = Prompt(system=None, context=context)
    (document,) = stream_documents(documents, template_columns(prompt, documents))
    rendered = Renderer(prompt, documents).render(document)
    assert rendered.context == "the id, the text, the text, the id, the other"
