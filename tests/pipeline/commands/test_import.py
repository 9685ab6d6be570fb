"""Batch files of the OpenAI API: imported as jobs, and answers exported as their output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.printable import printable
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")
QUESTIONS = ["Who signed?", "When does it end?\n\nName the day.", "What is due?"]


def request(custom_id: str, text: Any, system: str | None = "Be brief.", **body: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    body = {"model": "gpt-4o-mini", "messages": [*messages, {"role": "user", "content": text}], "max_tokens": 5, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(place: Workplace, requests: list[dict[str, Any]]) -> Path:
    file = place.folder / "batch.jsonl"
    file.write_text("".join(f"{json.dumps(each)}\n" for each in requests), encoding="utf-8")
    return file


@pytest.fixture
def requests(workplace: Workplace) -> list[dict[str, Any]]:
    """Three questions on each of three documents, in an order that mixes them."""
    return [
        request(f"r{number}-{name}", f"{text.strip()}\n\n{question}")
        for number, question in enumerate(QUESTIONS)
        for name, text in workplace.documents.items()
    ]


def test_requests_that_share_a_long_beginning_become_queries_of_one_document(
    workplace: Workplace, requests: list[dict[str, Any]]
) -> None:
    job = workplace.folder / "imported.yaml"
    imported = invoke("import", write(workplace, requests), job, "--model", workplace.model)
    assert imported.exit_code == 0, imported.output
    assert imported.stdout.splitlines()[0] == f"{job}: 3 documents, 9 queries"
    assert imported.stderr == ""
    ran = invoke("run", job, "--json")
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert (report["documents"], report["rows_answered"], report["prefixes_built"]) == (3, 9, 3)
    shown = invoke("plan", job, "--prompt").stdout
    for message in requests[0]["body"]["messages"]:
        assert message["content"] in shown
    to = workplace.folder / "answers.jsonl"
    assert invoke("export", job, "--layout", "batch", "--to", to).exit_code == 0
    lines = [json.loads(line) for line in to.read_text(encoding="utf-8").splitlines()]
    assert {line["custom_id"] for line in lines} == {each["custom_id"] for each in requests}
    shown_answers = {line.split("\t")[1]: line.split("\t")[3] for line in invoke("show", job).stdout.splitlines()}
    for line in lines:
        body = line["response"]["body"]
        assert (line["error"], line["response"]["status_code"], body["object"]) == (None, 200, "chat.completion")
        content = body["choices"][0]["message"]["content"]
        assert printable(" ".join(content.split())) == shown_answers[line["custom_id"]]
        assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]


def test_settings_are_taken_over_and_what_is_not_is_told(workplace: Workplace) -> None:
    text = f"{workplace.documents['d0']}\n\n"
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    requests = [
        request("a", f"{text}A?", None, temperature=0.5, seed=7, stop="x", presence_penalty=1.0, n=1),
        request("b", [{"type": "text", "text": f"{text}B?"}], None, response_format=response_format),
    ]
    job = workplace.folder / "imported.yaml"
    imported = invoke("import", write(workplace, requests), job, "--model", workplace.model)
    assert imported.exit_code == 0, imported.output
    assert "`presence_penalty` of 1 requests is left out" in imported.stderr
    assert "`n`" not in imported.stderr
    from pipeline.inputs.inputs import Inputs
    from pipeline.job.job_file import load_job

    (document,) = Inputs(load_job(job)).stream()
    a, b = document.queries
    assert (a.text, a.temperature, a.seed, a.stop, a.max_tokens) == ("A?", 0.5, 7, ("x",), 5)
    assert json.loads(b.json_schema or "") == schema
    assert invoke("import", workplace.folder / "batch.jsonl", job).exit_code == 2  # the job is there already


def test_failed_and_skipped_rows_are_errors_of_the_batch(workplace: Workplace) -> None:
    workplace.documents["d1"] = ""
    workplace.queries[0]["when"] = "id != 'd0'"
    invoke("run", workplace.save(), "--quiet")
    to = workplace.folder / "answers.jsonl"
    assert invoke("export", workplace.job_file, "--layout", "batch", "--to", to).exit_code == 0
    lines = {line["custom_id"]: line for line in map(json.loads, to.read_text().splitlines())}
    assert lines["d1/who"]["response"] is None
    assert lines["d1/who"]["error"] == {"code": "EmptyDocument", "message": "the document's text is empty"}
    assert lines["d0/what"]["error"]["code"] == "skipped"
    assert len(lines) == 9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: "),
        ("[]", "line 1: is no request"),
        (request("a", "One.\n\nTwo?") | {"url": "/v1/embeddings"}, "line 1: is a request to /v1/embeddings"),
        (request("", "One.\n\nTwo?"), "line 1: has no custom_id"),
        (request("a", "One.\n\nTwo?", messages=[{"role": "assistant"}]), "line 1: has messages of assistant"),
        (request("a", [{"type": "image_url"}]), "line 1: has a message that is not text alone"),
        *(
            (request("a", "One.\n\nTwo?", None, response_format=each), "line 1: has the response_format json_schema")
            for each in (
                "json_schema",
                {"type": "json_schema"},
                {"type": "json_schema", "json_schema": "x"},
                {"type": "json_schema", "json_schema": {"name": "x", "schema": "object"}},
            )
        ),
        (request("a", "word"), "request 'a' has no document and question"),
        ("", "there are no requests"),
    ],
)
def test_what_is_no_question_is_refused_with_its_line(workplace: Workplace, line: Any, message: str) -> None:
    file = workplace.folder / "batch.jsonl"
    file.write_text(line if isinstance(line, str) else json.dumps(line))
    assert message in error_of(invoke("import", file, workplace.folder / "new.yaml", "--model", "m"))
    assert not list(workplace.folder.glob("new*"))
