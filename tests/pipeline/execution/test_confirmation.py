"""A result is written only if each of its rows is the one that the job asks for at its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import OutputError
from pipeline.execution.finished_documents import FinishedDocuments
from pipeline.execution.runner import Runner
from pipeline.job.job_file import load_job
from pipeline.output.results import Results
from pipeline.progress import RunObserver
from pipeline.report import Report
from tests.pipeline.command_line import invoke
from tests.pipeline.workplace import Workplace


class AfterLastCommit(RunObserver):
    """Does something when all rows of a run are on disk and the result is not written yet."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def documents_done(self, document_ids: Sequence[str], report: Report) -> None:
        if report.documents_done == report.documents:
            self._action()


def check_run_again(workplace: Workplace, answered: int) -> None:
    """The same command answers the rows that were stale, and only those."""
    assert workplace.run().rows_answered == answered
    assert workplace.run().rows_kept == 9


@pytest.mark.parametrize("damage", [Path.unlink, lambda part: part.write_bytes(part.read_bytes()[:-9])])
def test_a_part_that_is_lost_is_not_replaced_by_older_rows(
    workplace: Workplace, damage: Callable[[Path], object]
) -> None:
    workplace.run()
    before = workplace.output.read_bytes()
    workplace.documents["d1"] = f"Now {workplace.documents['d1']}"

    def lose_parts() -> None:
        for part in Path(f"{workplace.output}.parts").glob("*/*.parquet"):
            damage(part)

    with pytest.raises(OutputError, match="document 'd1', query 'what': its new row is gone") as caught:
        workplace.run(observer=AfterLastCommit(lose_parts))
    assert caught.value.exit_code == 1
    assert workplace.output.read_bytes() == before
    check_run_again(workplace, 3)


def test_a_document_that_changes_while_the_job_runs_is_noticed(workplace: Workplace) -> None:
    def change() -> None:
        workplace.documents["d0"] = f"Now {workplace.documents['d0']}"
        workplace.save()

    with pytest.raises(OutputError, match="document 'd0', query 'what': the document, the query or the prompt changed"):
        workplace.run(observer=AfterLastCommit(change))
    assert not workplace.output.exists()
    check_run_again(workplace, 3)


def test_documents_that_are_gone_at_the_end_are_told(workplace: Workplace) -> None:
    documents = workplace.folder / "docs.parquet"
    with pytest.raises(OutputError, match=r"the job's inputs changed while it ran: .*docs\.parquet"):
        workplace.run(observer=AfterLastCommit(documents.unlink))
    check_run_again(workplace, 0)


def test_a_table_of_queries_that_changes_while_the_job_runs_is_noticed(workplace: Workplace) -> None:
    workplace.table = {"path": "queries.parquet"}

    def write(suffix: str) -> None:
        pq.write_table(
            pa.table({"id": ["a", "b", "c"], "text": [f"Who {suffix}", "When?", "Where?"]}),
            workplace.folder / "queries.parquet",
        )

    write("signed?")
    with pytest.raises(OutputError, match="the table of queries changed while the job ran"):
        workplace.run(observer=AfterLastCommit(lambda: write("decided?")))
    check_run_again(workplace, 3)


@pytest.mark.parametrize(("name", "what"), [("chat_template.jinja", "tokenizer"), ("config.json", "weights")])
def test_a_model_that_changes_while_the_job_runs_is_noticed(workplace: Workplace, name: str, what: str) -> None:
    workplace.tree["model"] = str(shutil.copytree(workplace.model, workplace.folder / "model"))
    file = workplace.folder / "model" / name

    def change() -> None:
        file.write_text(file.read_text() + " ")

    with pytest.raises(OutputError, match=f"the model's {what} changed while the job ran"):
        workplace.run(observer=AfterLastCommit(change))
    check_run_again(workplace, 9)


def test_a_process_that_goes_on_after_a_change_does_not_take_over_what_is_stale(workplace: Workplace) -> None:
    """The model's process may die, and be started again after the model's chat template was changed."""
    workplace.tree["model"] = str(shutil.copytree(workplace.model, workplace.folder / "model"))
    job, reports, finished = load_job(workplace.save()), [], FinishedDocuments()

    class NotesReports(RunObserver):
        def documents_done(self, document_ids: Sequence[str], report: Report) -> None:
            reports.append(replace(report))
            if len(reports) == 2:
                raise OSError("the process dies")
            finished.add(document_ids)

    with pytest.raises(OSError, match="the process dies"):
        Runner(job, NotesReports()).run()
    file = workplace.folder / "model" / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|end|>", "!<|end|>"))
    with pytest.raises(OutputError, match="document 'd0', query 'what': the document, the query or the prompt changed"):
        Runner(job, RunObserver(), report=reports[0], finished=finished).run()
    assert workplace.run().rows_answered in (3, 6)  # the stale rows
    assert workplace.run().rows_kept == 9


def test_a_job_file_that_changes_while_the_job_runs_is_told(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(job: Any, *_: Any) -> Report:
        report = Runner(job, RunObserver()).run()
        workplace.queries[0]["text"] += " Why?"
        workplace.save()
        return report

    monkeypatch.setattr("pipeline.execution.supervisor.supervise", run)
    result = invoke("run", workplace.job_file)
    assert result.exit_code == 1
    assert "job.yaml: changed while the job ran, and the result is of the job as it was" in result.stderr
    with Results(workplace.output, read_only=True) as results:
        assert len(results.rows("d0")) == 3


def test_a_job_file_that_is_gone_at_the_end_is_no_other_job(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(job: Any, *_: Any) -> Report:
        workplace.job_file.unlink()
        return Runner(job, RunObserver()).run()

    monkeypatch.setattr("pipeline.execution.supervisor.supervise", run)
    assert invoke("run", workplace.save()).exit_code == 0
