"""Queries that use the answers to others: what is asked, in which order, and what a later run keeps."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.printable import printable
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Interrupting, Workplace

pytestmark = pytest.mark.usefixtures("here")

Rows = dict[tuple[str, str], dict[str, Any]]
ASKED = {"id": "why", "text": "Why {{ answers.what }}, and {{ answers['when'] }}?"}
CHAIN = [
    {"id": "last", "text": "Is {{ answers.why }} right?", "when": "answers.kind == 'long'"},
    {"id": "what", "text": "What did the board decide?"},
    ASKED,
    {"id": "when", "text": "When does the lease end?", "max_tokens": 3},
    {"id": "kind", "text": "What kind of paper is it?", "choices": ["long", "short"]},
]


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """A job in four stages, of whose documents two share a batch."""
    workplace.queries = [dict(query) for query in CHAIN]
    workplace.save(generation={"max_tokens": 5, "batch_size": 2})
    return workplace


def alone(place: Workplace, texts: dict[str, str]) -> Rows:
    """The rows of an ordinary job that asks these texts, with the settings of the queries of these ids."""
    settings = {query["id"]: {key: value for key, value in query.items() if key != "when"} for query in place.queries}
    other = Workplace(place.folder / "alone", place.model)
    other.documents = place.documents
    other.queries = [{**settings[name], "text": text, "template": False} for name, text in texts.items()]
    other.run_with(generation=place.tree["generation"])
    return other.rows()


def without_counts(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("document_id", "query_id")}


def test_a_question_is_filled_in_with_answers_as_if_it_had_been_written_so(place: Workplace) -> None:
    result = invoke("run", place.job_file, "--json")
    assert result.exit_code == 0, result.output
    rows = place.rows()
    assert [pair[1] for pair in rows][:5] == ["last", "what", "why", "when", "kind"]
    for name in place.documents:
        text = f"Why {rows[name, 'what']['answer']}, and {rows[name, 'when']['answer']}?"
        written = alone(place, {"what": "What did the board decide?", "why": text})
        assert without_counts(written[name, "why"]) == without_counts(rows[name, "why"])


def test_a_condition_that_does_not_hold_is_a_row_that_is_skipped_and_counted(place: Workplace) -> None:
    place.queries[0]["when"] = "answers.kind == 'neither' or id == 'd1'"
    report = place.run()
    rows = place.rows()
    assert {name: rows[name, "last"]["status"] for name in place.documents} == {
        "d0": "skipped",
        "d1": "ok",
        "d2": "skipped",
    }
    assert (rows["d0", "last"]["answer"], rows["d0", "last"]["error"]) == (None, None)
    assert (report.rows, report.rows_answered, report.rows_skipped, report.rows_failed) == (15, 13, 2, 0)
    assert [place.report()[name] for name in ("rows_skipped", "rows_kept_unanswered")] == [2, 0]
    again = invoke("run", place.job_file)
    assert [place.report()[name] for name in ("rows_skipped", "rows_kept_unanswered")] == [2, 2]
    assert "rows     0 answered, 13 kept, 0 failed, 2 skipped of 15" in again.stdout
    assert "15 done (2 of them skipped), 0 failed, 0 left" in invoke("status", place.job_file).stdout
    assert "d0\tlast\tskipped\t(skipped)" in invoke("show", place.job_file).stdout.splitlines()
    assert invoke("export", place.job_file, "--to", place.folder / "w.jsonl", "--layout", "wide").exit_code == 0
    wide = [json.loads(line) for line in (place.folder / "w.jsonl").read_text().splitlines()]
    assert [each["last_error"] for each in wide] == ["skipped", None, "skipped"]


def test_what_uses_a_skipped_answer_sees_null(place: Workplace) -> None:
    place.queries[3]["when"] = "id == 'd0'"
    place.queries[0]["when"] = "answers.when == none"
    place.run()
    statuses = {pair: row["status"] for pair, row in place.rows().items()}
    assert [statuses[name, "when"] for name in place.documents] == ["ok", "skipped", "skipped"]
    assert [statuses[name, "last"] for name in place.documents] == ["skipped", "ok", "ok"]


def test_a_row_that_uses_a_failed_answer_fails_and_names_it(place: Workplace) -> None:
    place.queries[1]["text"] = "What? " + "x" * 9000  # more than the model reads
    report = place.run()
    rows = place.rows()
    assert rows["d0", "what"]["error_type"] == "ContextTooLong"
    assert rows["d0", "why"]["error_type"] == "AnswerMissing"
    assert rows["d0", "why"]["error"].startswith("the answer to 'what', which it uses, failed: ContextTooLong: ")
    assert report.failures == {"ContextTooLong": 3, "AnswerMissing": report.failures["AnswerMissing"]}
    place.queries[1]["text"] = "What did the board decide?"
    assert place.run().rows_failed == 0


def test_a_later_run_keeps_what_does_not_depend_on_what_changed(place: Workplace) -> None:
    place.run()
    first = place.output.read_bytes()
    assert (place.run().rows_kept, place.output.read_bytes()) == (len(place.rows()) - place.run().rows_skipped, first)
    place.queries[4]["choices"] = ["long", "brief"]  # `kind`, which only the condition of `last` uses
    report = place.run()
    assert report.rows_answered <= 6
    kept = {pair: row["fingerprint"] for pair, row in place.rows().items() if pair[1] in ("what", "why", "when")}
    place.queries[1]["text"] = "What did the board not decide?"
    place.run()
    changed = {pair[1] for pair, fingerprint in kept.items() if place.rows()[pair]["fingerprint"] != fingerprint}
    assert changed == {"what", "why"}


def test_a_run_that_is_interrupted_between_stages_gives_the_same_bytes(place: Workplace) -> None:
    whole = Workplace(place.folder / "whole", place.model)
    whole.queries = place.queries
    whole.run_with(generation=place.tree["generation"])
    for row in (1, 3, 4, 5, 8):
        place.output.unlink(missing_ok=True)
        report = place.run(observer=Interrupting(row=row))
        assert report.interrupted
        place.run()
        assert place.output.read_bytes() == whole.output.read_bytes()


def test_earlier_questions_and_answers_are_shown_as_a_conversation(workplace: Workplace) -> None:
    workplace.queries[2]["previous"] = True
    workplace.run()
    rows = workplace.rows()
    shown = invoke("plan", workplace.job_file, "--prompt", "--query", "who").stdout
    for text in ("What did the board decide?", "When does the lease end?", "Who signed the contract?"):
        assert shown.count(text) == 1 + workplace.documents["d0"].count(text)
    assert printable(rows["d0", "what"]["answer"]).strip() in shown
    assert rows["d0", "who"]["query_tokens"] > rows["d0", "what"]["query_tokens"] + rows["d0", "when"]["query_tokens"]
    assert workplace.run().rows_kept == 9


def test_a_query_takes_along_what_it_needs(place: Workplace) -> None:
    place.save()
    assert invoke("run", place.job_file, "--query", "why", "--document", "d1").exit_code == 0
    assert set(place.rows()) == {("d1", "what"), ("d1", "why"), ("d1", "when")}
    shown = invoke("show", place.job_file, "--query", "why", "--document", "d1").stdout
    assert [line.split("\t")[1] for line in shown.splitlines()] == ["why"]


def test_a_plan_counts_the_stages(place: Workplace) -> None:
    planned = invoke("plan", place.save())
    assert "queries    5 a document, in 3 stages: some use the answers of others" in planned.stdout
    refused = error_of(invoke("plan", place.job_file, "--prompt", "--query", "why"))
    assert refused == "plan --prompt: query 'why' uses answers that are not there yet; run the job first"


def test_columns_of_the_document_are_filled_in_too(workplace: Workplace) -> None:
    workplace.queries = [
        {"id": "a", "text": "What is {{ id }}?", "template": True},
        {"id": "b", "text": "What is {{ id }}?"},
        {"id": "c", "text": "{{ answers.a | length }} of {{ id }}?"},
    ]
    workplace.run()
    rows = workplace.rows()
    written = alone(workplace, {"a": "What is d1?", "b": "What is {{ id }}?"})
    assert rows["d1", "a"]["fingerprint"] == written["d1", "a"]["fingerprint"]
    assert rows["d1", "b"]["fingerprint"] == written["d1", "b"]["fingerprint"]


def test_an_answer_of_a_schema_is_used_by_its_keys(workplace: Workplace) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 7, "maximum": 7}}, "required": ["n"]}
    workplace.queries = [
        {"id": "a", "text": "How many?", "json_schema": schema, "max_tokens": 20},
        {"id": "b", "text": "Why {{ answers.a.n }} in {{ answers.a }}?", "when": "answers.a.n == 7"},
    ]
    workplace.run()
    text = f"Why 7 in {json.dumps(json.loads(workplace.rows()['d0', 'a']['answer']))}?"
    assert workplace.rows()["d0", "b"]["fingerprint"] == alone(workplace, {"b": text})["d0", "b"]["fingerprint"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"what": {"text": "{{ answers.why }}?"}},
            "queries: 'why' uses the answer of 'what', which uses that of 'why': that is a circle",
        ),
        (
            {"why": {"text": "{{ answers.whatt }}?"}},
            "'why' uses the answer of 'whatt'; there is no such query; ",
        ),
        ({"why": {"text": "{{ answers.what }"}}, "queries: the text of 'why': line 1 of the template: "),
        ({"why": {"text": "{{ answers.what }}{{ answers | list }}"}}, "answers is used without the id of a query"),
        ({"why": {"when": "answers.what =="}}, "queries: `when` of 'why': "),
        ({"why": {"when": "answers.why == 'x'"}}, "'why' uses the answer of 'why': that is a circle"),
        ({"why": {"text": "{{ answers.what }} {{ title }}"}}, "title"),
        ({"why": {"text": "{{ answers.what | random }}"}}, "No filter named 'random'"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(
    place: Workplace, changes: dict[str, dict[str, Any]], message: str
) -> None:
    place.queries = [query | changes.get(query["id"], {}) for query in place.queries]
    place.save()
    for command in ("plan", "run"):
        assert message in error_of(invoke(command, place.job_file))
    assert not place.output.exists()


def test_a_document_that_is_read_in_windows_is_asked_in_stages_too(place: Workplace) -> None:
    place.documents["d1"] = "The board met on the third of May and decided the budget for the year. " * 160
    place.save(documents={"path": "docs.parquet", "too_long": "split"})
    report = place.run()
    assert (report.documents_split, report.rows_failed) == (1, 0)
    first = place.output.read_bytes()
    rows = place.rows()
    assert rows["d1", "why"]["context_tokens"] == rows["d1", "what"]["context_tokens"] > 2048
    again = place.run()
    assert (again.rows_kept + again.rows_skipped, place.output.read_bytes()) == (15, first)


def test_queries_that_belong_to_documents_use_each_others_answers(workplace: Workplace) -> None:
    workplace.table = {"path": "asked.jsonl", "document_id": "doc"}
    asked = [
        {"doc": "d0", "id": "b", "text": "Why {{ answers.a }} of {{ id }}?"},
        {"doc": "d0", "id": "a", "text": "Who?"},
        {"doc": "d1", "id": "b", "text": "When?", "when": "id == 'd0'"},
        {"doc": "d2", "id": "c", "text": "Whose?"},
    ]
    file = workplace.folder / "asked.jsonl"
    file.write_text("\n".join(map(json.dumps, asked)))
    report = workplace.run()
    assert (report.rows_answered, report.rows_skipped, report.rows_failed) == (3, 1, 0)
    assert list(workplace.rows()) == [("d0", "b"), ("d0", "a"), ("d1", "b"), ("d2", "c")]
    assert invoke("run", workplace.job_file, "--query", "b", "--json").exit_code == 0
    assert workplace.report()["rows"] == 3
    file.write_text("\n".join(map(json.dumps, [*asked, {"doc": "d2", "id": "d", "text": "{{ answers.a }}?"}])))
    assert "'d' uses the answer of 'a'; there is no such query" in error_of(invoke("run", workplace.job_file))


def test_shards_give_the_bytes_of_the_whole_job(place: Workplace) -> None:
    place.run()
    whole = place.output.read_bytes()
    place.output.unlink()
    for number in (1, 2):
        assert invoke("run", place.job_file, "--shard", f"{number}/2").exit_code == 0
    merged = invoke("merge", place.job_file, "--json")
    assert merged.exit_code == 0, merged.output
    assert place.output.read_bytes() == whole


def test_a_document_that_the_model_must_not_see_again_has_a_row_for_every_query(place: Workplace) -> None:
    from pipeline.execution.runner import Runner
    from pipeline.job.job_file import load_job

    place.run()
    place.queries[1]["text"] = "What did the board not decide?"
    report = Runner(load_job(place.save()), place.observer, quarantined={"d1": "it died"}).run()
    rows = place.rows()
    assert {rows["d1", name]["status"] for name in ("when", "kind")} == {"ok"}
    assert (rows["d1", "what"]["error_type"], rows["d1", "why"]["error_type"]) == ("ModelProcessDied", "AnswerMissing")
    assert report.rows_failed == sum(row["status"] == "error" for row in rows.values())


def test_rows_of_all_documents_fill_batches_in_each_stage() -> None:
    from pipeline.inputs.batching import group_documents
    from pipeline.inputs.documents import Document
    from pipeline.inputs.questions import chain_of
    from pipeline.job.job import Query

    queries = [Query(id="a", text="A?"), Query(id="b", text="B?"), Query(id="c", text="{{ answers.a }}?")]
    documents = [Document(str(number), "a text", {}, queries) for number in range(10)]
    groups = group_documents(
        documents, 4, stages=lambda document: [len(stage) for stage in chain_of(document.queries).stages]
    )
    assert [len(group) for group in groups] == [4, 4, 2]
