"""Answers that `max_tokens` cuts off are told, and with a larger limit only they are answered again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pipeline.execution.fingerprint import is_within
from pipeline.job.job import Settings
from pipeline.output.results import Results
from pipeline.output.rows import Row
from tests.pipeline.command_line import in_terminal, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """A job whose query `when` is cut off at three tokens, and whose other queries end at a vowel."""
    for query in workplace.queries[::2]:
        query |= {"stop": list("aeiou "), "max_tokens": 200}
    workplace.save()
    return workplace


def test_cut_answers_are_told_with_advice(place: Workplace) -> None:
    ran = invoke("run", place.job_file)
    assert ran.exit_code == 0
    told = [
        "3 answers, by max_tokens; with more, only these are answered again",
        "3 of query 'when' at 3: --set queries.1.max_tokens=6",
    ]
    for line in [*told, f"to look at them: pipeline show {place.job_file} --cut"]:
        assert line in ran.stdout
    cut = {"rows": 3, "queries": {"when": 3}, "max_tokens": {"when": 3}}
    assert place.report()["cut"] == cut
    assert json.loads(invoke("status", place.job_file, "--json").stdout)["cut"] == cut
    for line in told:
        assert line in invoke("status", place.job_file).stdout
        assert line in invoke("show", place.job_file).stderr
        assert line in invoke("run", place.job_file).stdout  # of rows that were kept
    shown = [json.loads(line) for line in invoke("show", place.job_file, "--cut", "--json").stdout.splitlines()]
    assert [(row["document_id"], row["query_id"]) for row in shown] == [(f"d{number}", "when") for number in range(3)]
    assert "[cut off at 3 tokens]" in " ".join(in_terminal(200, "show", place.job_file))


def test_a_job_whose_answers_are_whole_says_nothing(place: Workplace) -> None:
    del place.queries[1]
    assert "cut off" not in invoke("run", place.save()).stdout
    assert invoke("show", place.job_file).stderr == ""


def test_a_larger_limit_answers_only_what_was_cut(place: Workplace) -> None:
    place.run()
    before = place.rows()
    more = [f"--set=queries.{number}.max_tokens={limit}" for number, limit in enumerate([300, 9, 300])]
    assert "9: 6 done, 0 failed, 3 left" in invoke("status", place.job_file, *more).stdout
    report = json.loads(invoke("run", place.job_file, "--json", *more).stdout)
    assert (report["rows_kept"], report["rows_answered"]) == (6, 3)
    after, kept = place.rows(), place.output.read_bytes()
    assert all(after[pair] == before[pair] for pair in before if pair[1] != "when")
    assert all(3 < after[pair]["answer_tokens"] <= 9 for pair in after if pair[1] == "when")
    place.output.unlink()
    invoke("run", place.job_file, "--quiet", *more)
    assert place.output.read_bytes() == kept


def test_a_smaller_limit_answers_what_it_would_cut(place: Workplace) -> None:
    place.run()
    before = place.rows()
    longer = [pair for pair, row in before.items() if pair[1] == "what" and row["answer_tokens"] > 1]
    assert place.run("queries.0.max_tokens=1").rows_answered == len(longer) > 0
    after = place.rows()
    assert [pair for pair in before if after[pair] != before[pair]] == longer
    assert all(after[pair]["finish_reason"] == "length" for pair in longer)


@pytest.mark.parametrize(
    ("finish_reason", "tokens", "limit", "settings", "expected"),
    [
        ("stop", 5, 6, {}, True),
        ("stop", 5, 5, {}, False),  # the token that stops the model had no room
        ("stop", 5, 5, {"stop": ("x",)}, True),
        ("stop", 5, 5, {"json_schema": "{}"}, True),
        ("stop", 5, 4, {"stop": ("x",)}, False),
        ("length", 5, 5, {}, True),
        ("length", 5, 6, {}, False),
        ("length", 5, 4, {}, False),
        (None, None, 1, {}, True),
    ],
)
def test_when_an_answer_is_what_another_limit_gives(
    finish_reason: str | None, tokens: int | None, limit: int, settings: dict[str, Any], expected: bool
) -> None:
    row = Row("d", "q", "ok", "0", finish_reason=finish_reason, answer_tokens=tokens)
    assert is_within(row, Settings(limit, 0.0, 1.0, 0, **settings)) == expected


def test_a_result_of_a_former_release_is_kept_and_gets_new_fingerprints(place: Workplace) -> None:
    from pipeline.execution.fingerprint import RowFingerprints, job_identity
    from pipeline.inputs.inputs import Inputs
    from pipeline.inputs.prompts import Renderer
    from pipeline.inputs.questions import Question
    from pipeline.job.job_file import load_job

    place.run()
    new = place.output.read_bytes()
    job = load_job(place.job_file)
    identity, renderer = job_identity(job), Renderer(job.prompt, job.documents)
    with Results(job.result_file) as results:
        for document in Inputs(job).stream():
            of_rows = RowFingerprints(identity, renderer.render(document), job.generation)
            former = {
                query.id: of_rows.of(query, Question(query.text), with_max_tokens=True) for query in document.queries
            }
            rows = results.rows(document.id)
            results.commit({document.id: [replace(row, fingerprint=former[key]) for key, row in rows.items()]})
        results.finish(Inputs(job).pairs())
    assert place.output.read_bytes() != new
    assert json.loads(invoke("run", place.job_file, "--json").stdout)["rows_kept"] == 9
    assert place.output.read_bytes() == new
