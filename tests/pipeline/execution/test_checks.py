"""Answers that are checked: asked again with the reason, and refused in the end."""

from __future__ import annotations

import json

import pytest

from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Interrupting, Workplace


def test_an_answer_that_fails_its_check_is_an_error_that_keeps_the_answer(workplace: Workplace) -> None:
    workplace.run()
    before = workplace.rows()
    workplace.queries[0]["check"] = "len(answer) < 2"
    workplace.queries[1]["check"] = "answer | length < 2000 and id != 'd1'"
    workplace.queries.append({"id": "then", "text": "Why {{ answers.what }}?"})
    report = workplace.run()
    rows = workplace.rows()
    assert report.failures == {"CheckFailed": 4, "AnswerMissing": 3}
    assert rows["d0", "what"]["error"] == "the answer is not as check wants it: len(answer) < 2; asked once"
    assert rows["d0", "what"]["answer"] == before["d0", "what"]["answer"]
    assert [rows[name, "when"]["status"] for name in workplace.documents] == ["ok", "error", "ok"]
    assert rows["d0", "who"] == before["d0", "who"]
    shown = invoke("show", workplace.job_file, "--failed").stdout
    assert "CheckFailed: the answer is not as check wants it" in shown


def test_a_query_is_asked_again_with_another_seed_and_the_reason(workplace: Workplace) -> None:
    workplace.run()
    first = {pair: row["answer"] for pair, row in workplace.rows().items()}
    refused = first["d0", "what"]
    workplace.queries[0] |= {"check": f"answer != {json.dumps(refused)}", "retries": 3}
    report = workplace.run()
    rows = workplace.rows()
    assert report.rows_failed == 0
    assert rows["d0", "what"]["answer"] != refused
    assert rows["d0", "what"]["query_tokens"] > rows["d1", "what"]["query_tokens"]  # the reason is behind the question
    assert rows["d1", "what"]["answer"] == first["d1", "what"]
    bytes_before = workplace.output.read_bytes()
    assert (workplace.run().rows_kept, workplace.output.read_bytes()) == (9, bytes_before)
    workplace.output.unlink()
    assert workplace.run(observer=Interrupting(row=2)).interrupted
    workplace.run()
    assert workplace.output.read_bytes() == bytes_before


def test_after_the_last_retry_the_row_fails_and_says_how_often_it_was_asked(workplace: Workplace) -> None:
    workplace.queries[0] |= {"check": "answer in context and answer is matches('^never$')", "retries": 2}
    report = workplace.run()
    assert report.failures == {"CheckFailed": 3}
    assert workplace.rows()["d1", "what"]["error"].endswith("; asked 3 times")


def test_a_document_that_is_read_in_windows_is_checked_by_its_last_answer(workplace: Workplace) -> None:
    workplace.documents["d1"] = "The board met on the third of May and decided the budget for the year. " * 160
    workplace.queries[0] |= {"check": "len(answer) < 1", "retries": 1}
    report = workplace.run_with(documents={"path": "docs.parquet", "too_long": "split"})
    assert (report.documents_split, report.failures) == (1, {"CheckFailed": 3})
    assert workplace.rows()["d1", "what"]["error"].endswith("; asked 2 times")


def test_a_check_that_fails_or_never_ends_refuses_the_answer(workplace: Workplace) -> None:
    workplace.queries[0]["check"] = "answer > 3"
    workplace.queries[1]["check"] = "answer ~ 'x' * 40 ~ '!' is matches('(x+x+)+y')"
    workplace.queries[2]["check"] = "answer"
    workplace.run()
    rows = workplace.rows()
    assert "'>' not supported" in rows["d0", "what"]["error"]
    assert rows["d0", "when"]["error_type"] == "CheckFailed"
    assert "expected a condition that is true or false" in rows["d0", "who"]["error"]


def test_an_answer_that_was_accepted_is_checked_again_when_a_column_of_the_check_changes(workplace: Workplace) -> None:
    workplace.queries = [{"id": "what", "text": "What?", "check": "len(answer) < longest"}]
    workplace.save(documents={"path": "docs.jsonl"})
    for longest, failed in ((200, 0), (1, 3), (200, 0)):
        rows = [{"id": name, "text": text, "longest": longest} for name, text in workplace.documents.items()]
        (workplace.folder / "docs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        assert workplace.run().rows_failed == failed


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"check": "len(answer"}, "queries: `check` of 'what': "),
        ({"check": "answers.who == answer"}, "queries: `check` of 'what': it is about one answer"),
        ({"check": "title == answer"}, "title"),
        ({"retries": 2}, "has retries and no check"),
        ({"check": "true", "retries": 99}, "retries"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(
    workplace: Workplace, changes: dict[str, object], message: str
) -> None:
    workplace.queries[0] |= changes
    assert message in error_of(invoke("run", workplace.save()))
