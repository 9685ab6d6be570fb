"""`show`: the answers of a job, finished or not, on a terminal, in a pipe, and in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pipeline.commands.show import SURROUNDINGS, AnswerTable
from pipeline.job.job_file import load_job
from pipeline.models.quotations import located
from pipeline.output.results import Results
from pipeline.output.rows import Row
from tests.pipeline.command_line import ROOT, error_of, in_terminal, invoke
from tests.pipeline.workplace import Workplace

HOSTILE = '<script>document.title = "hacked"</script><img src=x onerror="document.title=1">\x1b[2J\u202e & "so" on'
LONG = "\n".join(f"{number} lease" for number in range(30))


@pytest.fixture
def answered(workplace: Workplace) -> Workplace:
    """A job that is halfway: d0 has answers, d1 an error among them, and d2 nothing yet."""
    workplace.save()
    rows = {
        "d0": [ok("d0", "what", HOSTILE), ok("d0", "when", "In May.\nOr in June."), ok("d0", "who", LONG)],
        "d1": [ok("d1", "what", "A lease"), ok("d1", "when", "日本語 " * 20), failed("d1", "who")],
    }
    with Results(workplace.output) as results:
        results.commit(rows)
    return workplace


def ok(document_id: str, query_id: str, answer: str) -> Row:
    return Row(document_id, query_id, "ok", "0", answer=answer, finish_reason="stop", answer_tokens=3)


def failed(document_id: str, query_id: str) -> Row:
    return Row(document_id, query_id, "error", "0", error_type="GenerationFailed", error="the model failed: x")


# ---- in a pipe


def test_a_row_is_a_line(answered: Workplace) -> None:
    shown = invoke("show", answered.job_file)
    assert shown.exit_code == 0
    rows = [line.split("\t") for line in shown.stdout.splitlines()]
    assert [row[:3] for row in rows] == [
        ["d0", "what", "ok"],
        ["d0", "when", "ok"],
        ["d0", "who", "ok"],
        ["d1", "what", "ok"],
        ["d1", "when", "ok"],
        ["d1", "who", "error"],
    ]
    assert rows[1][3] == "In May. Or in June."
    assert rows[5][3] == "GenerationFailed: the model failed: x"
    assert "\x1b" not in shown.stdout
    assert "\u202e" not in shown.stdout


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        (["--document", "d1"], ["d1 what", "d1 when", "d1 who"]),
        (["--query", "who", "--query", "what"], ["d0 what", "d0 who", "d1 what", "d1 who"]),
        (["--failed"], ["d1 who"]),
        (["--failed", "--query", "what"], []),
        (["--document", "d2"], []),
        (["--limit", "1"], ["d0 what", "d0 when", "d0 who"]),
        (["--document", "d[12]", "--limit", "1", "--query", "who"], ["d1 who"]),
    ],
)
def test_documents_and_queries_can_be_selected(answered: Workplace, options: list[str], pairs: list[str]) -> None:
    rows = [json.loads(line) for line in invoke("show", answered.job_file, "--json", *options).stdout.splitlines()]
    assert [f"{row['document_id']} {row['query_id']}" for row in rows] == pairs


def test_json_lines_have_all_columns(answered: Workplace) -> None:
    first, *_ = invoke("show", answered.job_file, "--json").stdout.splitlines()
    assert json.loads(first) == vars(ok("d0", "what", HOSTILE))


def test_a_finished_job_is_shown_in_the_order_of_its_documents(workplace: Workplace) -> None:
    workplace.documents["blank"] = ""
    workplace.run()
    rows = [json.loads(line) for line in invoke("show", workplace.job_file, "--json").stdout.splitlines()]
    assert rows == list(workplace.rows().values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--query", "wo"], "--query wo: the job has no such query; did you mean 'who'?"),
        (["--document", "d7"], "--document d7: there is no such document in "),
        (["--set", "documents.text=txt"], "documents.text names the column 'txt'"),
    ],
)
def test_unknown_ids_are_named(answered: Workplace, options: list[str], words: str) -> None:
    assert words in error_of(invoke("show", answered.job_file, *options))


def test_a_job_without_answers(workplace: Workplace) -> None:
    result = invoke("show", workplace.job_file)
    assert result.exit_code == 1
    assert (
        result.stderr
        == f"error: {workplace.output}: there are no answers yet; pipeline run {workplace.job_file} makes them\n"
    )


def test_a_closed_pipe_is_no_error(answered: Workplace) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pipeline.cli", "show", str(answered.job_file)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(write)
    assert done.stderr == b""


# ---- on a terminal


def test_queries_are_side_by_side_if_there_is_room(answered: Workplace) -> None:
    lines = in_terminal(100, "show", answered.job_file, NO_COLOR="1")
    plain = [line.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "") for line in lines]
    assert all(len(line) <= 100 for line in plain)
    assert plain[0].split() == ["what", "when", "who"]
    (may,) = [line for line in plain if "In May." in line]
    assert may.startswith("d0")
    assert "0 lease" in may
    assert "7 lease" not in "".join(lines)  # eight lines at most
    assert "…" in "".join(lines)
    assert [line.split() for line in plain if line.startswith("d2")] == [["d2", "open", "open", "open"]]


def test_queries_are_in_bands_if_there_is_little_room(answered: Workplace) -> None:
    lines = in_terminal(40, "show", answered.job_file, "--full", NO_COLOR="1")
    assert [line.strip() for line in lines if "29 lease" in line] == ["29 lease"]
    heads = [number for number, line in enumerate(lines) if line.strip(" \x1b[01m") in ("what", "when", "who")]
    assert len(heads) == 3


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_gets_colours_unless_they_are_not_wanted(answered: Workplace, no_color: str) -> None:
    screen = "\n".join(in_terminal(100, "show", answered.job_file, NO_COLOR=no_color))
    assert ("\x1b[31m" in screen) is (no_color == "")
    assert "\x1b[2J" not in screen  # what an answer has of such things is not sent
    assert "\u202e" not in screen


# ---- in a browser


def test_a_page_breaks_no_word_that_has_room(answered: Workplace) -> None:
    page = answered.folder / "page.html"
    invoke("show", answered.job_file, "--html", page)
    assert "overflow-wrap: anywhere" not in page.read_text()  # it makes columns narrower than their words


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: playwright's own, else the system's."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        paths = [None, *filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))]
        for path in paths:
            try:
                launched = playwright.chromium.launch(executable_path=path)
            except api.Error:
                continue
            yield launched
            launched.close()
            return
        pytest.skip("no Chromium can be started: playwright install chromium, or install the system's")


@pytest.fixture
def page(browser: Any, answered: Workplace) -> Iterator[Any]:
    """The page of a job whose query ids and texts are as hostile as its answers."""
    answered.queries[1]["text"] = HOSTILE
    answered.documents[f"<b>{HOSTILE[:40]}"] = "A text."
    answered.save()
    file = answered.folder / "pages" / "page.html"
    assert invoke("show", answered.job_file, "--html", file).stdout == f"{file}\n"
    page = browser.new_page()
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.problems.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    yield page
    assert page.problems == []  # no error, and nothing else was asked for
    page.close()


def visible(page: Any, selector: str) -> list[str]:
    return [element.inner_text() for element in page.query_selector_all(selector) if element.is_visible()]


def test_a_page_shows_all_answers_as_text(page: Any) -> None:
    assert page.title() == "job"
    assert visible(page, "thead th") == ["document", "what", "when", "who"]
    assert visible(page, "tbody th") == ["d0", "d1", "d2", f"<b>{HOSTILE[:40]}"]
    assert page.query_selector("tbody td").text_content().startswith(HOSTILE[:70])
    assert page.query_selector("img") is None
    assert len(page.query_selector_all("script")) == 1
    assert page.query_selector("#count").inner_text() == "12 answers, 4 documents"


def test_a_page_is_filtered_by_text_query_and_status(page: Any) -> None:
    page.fill("#text", "LEASE")
    assert visible(page, "tbody th") == ["d0", "d1"]
    page.select_option("#query", label="who")
    assert visible(page, "tbody th") == ["d0"]
    assert visible(page, "thead th") == ["document", "who"]
    page.fill("#text", "")
    page.select_option("#status", "error")
    assert visible(page, "tbody th") == ["d1"]
    assert visible(page, "tbody td") == ["GenerationFailed: the model failed: x"]
    page.select_option("#status", "open")
    assert len(visible(page, "tbody th")) == 2
    assert page.query_selector("#count").inner_text() == "2 answers, 2 documents"


def test_a_page_of_failed_rows_calls_no_other_open(answered: Workplace) -> None:
    file = answered.folder / "page.html"
    invoke("show", answered.job_file, "--failed", "--html", file)
    content = file.read_text()
    assert content.count('<td data-status="error">') == 1
    assert content.count('<td data-status="">') == 2


def test_a_page_that_cannot_be_written(answered: Workplace) -> None:
    (answered.folder / "file").write_text("")
    result = invoke("show", answered.job_file, "--html", answered.folder / "file" / "page.html")
    assert result.exit_code == 1
    assert "page.html: cannot be written: " in result.stderr


def test_a_page_is_whole_or_not_there(answered: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(row: Row) -> str:
        raise LookupError

    file = answered.folder / "page.html"
    file.write_text("before")
    monkeypatch.setattr("pipeline.commands.page.answer_or_error", fail)
    assert invoke("show", answered.job_file, "--html", file).exit_code == 1
    assert file.read_text() == "before"
    assert not list(answered.folder.glob(".tmp-*"))


# ---- evidence


@pytest.fixture
def with_evidence(workplace: Workplace) -> Workplace:
    """One document whose hostile text is quoted, and a choice with its probability."""
    workplace.documents = {"d0": f"It began well.  {HOSTILE} It ended on 3 May 2021. It ended on 3 May 2021."}
    workplace.queries = [
        {"id": "when", "text": "When did it end?", "evidence": 2},
        {"id": "well", "text": "Did it begin well?", "choices": ["yes", "no"]},
    ]
    workplace.save()
    text = workplace.documents["d0"]
    quotes = [located("It ended on 3 May 2021.", text), located("<script>document.title", text)]
    rows = [
        replace(ok("d0", "when", "On 3 May."), evidence=quotes, logprob_mean=-0.25, logprob_min=-1.5),
        replace(ok("d0", "well", "yes"), choice_probabilities={"yes": 0.9375, "no": 0.0625}, logprob_mean=-0.1),
    ]
    with Results(workplace.output) as results:
        results.commit({"d0": rows})
    return workplace


def test_evidence_is_shown_in_its_surroundings(with_evidence: Workplace) -> None:
    lines = " ".join(in_terminal(100, "show", with_evidence.job_file))
    shown = " ".join(re.sub("\x1b\\[[0-9;]*m", "", lines).split())
    assert '» & "so" on It ended on 3 May 2021.' in shown
    assert "It ended on 3 May 2021. It ended on" in shown


def test_a_page_shows_evidence_one_click_away(browser: Any, with_evidence: Workplace) -> None:
    file = with_evidence.folder / "page.html"
    invoke("show", with_evidence.job_file, "--html", file)
    page = browser.new_page()
    page.goto(file.as_uri())
    assert page.title() == "job"  # nothing of the document ran
    assert visible(page, "summary") == ["evidence, 2 times in the document", "evidence"]
    assert visible(page, "mark") == []
    page.click("summary")
    assert visible(page, "mark") == ["It ended on 3 May 2021."]
    assert 'so" on It ended on 3 May 2021. It ended' in page.query_selector("details").inner_text()
    assert visible(page, "small") == ["log-probability -0.25, at least -1.50", "probability 0.94"]
    page.close()


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        ("unless " * 60 + "HERE" + " otherwise" * 60, "unless " * 22, " otherwise" * 16),
        ("契" * 300 + "HERE" + "約" * 300, "契" * SURROUNDINGS, "約" * SURROUNDINGS),
        ("It is HERE now.", "It is ", " now."),
    ],
)
def test_no_word_around_a_quotation_is_cut(workplace: Workplace, text: str, before: str, after: str) -> None:
    workplace.documents = {"d0": text}
    workplace.queries = [{"id": "where", "text": "Where?", "evidence": True}]
    workplace.save()
    with Results(workplace.output) as results:
        results.commit({"d0": [replace(ok("d0", "where", "Here."), evidence=[located("HERE", text)])]})
    answers = AnswerTable(load_job(workplace.job_file))
    ((_, rows),) = answers
    (passage,) = answers.passages(rows["where"])
    assert (passage.before, passage.after) == (before, after)


@pytest.mark.parametrize("document_id", ["d0", "d1"])
def test_evidence_is_shown_with_its_page_where_the_document_has_pages(workplace: Workplace, document_id: str) -> None:
    workplace.documents = {"d0": "It began well.\fIt ended on 3 May 2021.\f", "d1": "It ended on 3 May 2021."}
    workplace.queries = [{"id": "when", "text": "When did it end?", "evidence": True}]
    workplace.save()
    quotes = [located("It ended on 3 May 2021.", workplace.documents[document_id])]
    with Results(workplace.output) as results:
        results.commit({document_id: [replace(ok(document_id, "when", "On 3 May."), evidence=quotes)]})
    options = [workplace.job_file, "--document", document_id]
    shown = " ".join(re.sub("\x1b\\[[0-9;]*m", "", " ".join(in_terminal(100, "show", *options))).split())
    file = workplace.folder / "page.html"
    invoke("show", *options, "--html", file)
    summary = re.findall("<summary>(.*?)</summary>", file.read_text())
    if document_id == "d0":
        assert shown.endswith("» page 2: It began well. It ended on 3 May 2021.")
        assert summary == ["evidence, page 2"]
    else:
        assert shown.endswith("» It ended on 3 May 2021.")
        assert summary == ["evidence"]


def test_a_document_that_changed_since_is_not_quoted_around(with_evidence: Workplace) -> None:
    with_evidence.documents["d0"] = "Another text."
    with_evidence.save()
    file = with_evidence.folder / "page.html"
    invoke("show", with_evidence.job_file, "--html", file)
    assert "</summary><mark>It ended on 3 May 2021.</mark></details>" in file.read_text()
