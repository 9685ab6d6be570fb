"""A run in several processes on one machine: the same bytes as in one, whoever is killed meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.execution import process_pool
from pipeline.execution.context import RunContext
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.finished_documents import FinishedDocuments
from pipeline.execution.lease_worker import LeaseWorker
from pipeline.execution.pool_executor import PoolExecutor
from pipeline.execution.process_pool import ProcessPool, share_cores
from pipeline.execution.runner import Runner
from pipeline.execution.task import DocumentTask, GroupResult
from pipeline.inputs.inputs import Inputs
from pipeline.job.job_file import load_job
from pipeline.report import Report, WorkStats
from tests import ROOT, warm
from tests.pipeline.command_line import invoke
from tests.pipeline.workplace import Interrupting, Recorder, Workplace

GIB = 1 << 30


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """A workplace of eight documents, each of which is a lease, for two processes."""
    workplace.documents |= {f"e{number}": f"Paper {number} says {number * 7}. " * 20 for number in range(5)}
    workplace.tree["scale"] = {"processes": 2}
    workplace.save()
    return workplace


_written_alone: dict[str, bytes] = {}


def alone(place: Workplace, *overrides: str) -> bytes:
    """What a run in one process writes. Each job is run once for all tests."""
    job = json.dumps([place.documents, place.queries, place.tree, overrides])
    if job not in _written_alone:
        other = Workplace(place.folder / "alone", place.model)
        other.documents, other.queries, other.tree = place.documents, place.queries, place.tree
        other.run("scale.processes=1", *overrides)
        _written_alone[job] = other.output.read_bytes()
    return _written_alone[job]


class Dying(LeaseWorker):
    """A worker that is killed a moment after it has begun with a document, as often as a file beside the store says."""

    def _answer(self, prepared: Any) -> Any:
        for each in prepared:
            file = self._job.cache.dir.parent / f"deaths-{each.task.document_id}"
            if file.exists() and (left := int(file.read_text())):
                file.write_text(str(left - 1))
                time.sleep(0.5)  # at once, what was answered just before may be lost too
                os.kill(os.getpid(), signal.SIGKILL)
        return super()._answer(prepared)


class Stillborn(LeaseWorker):
    """A worker that dies while it loads the model."""

    def _start(self, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Aborting(LeaseWorker):
    """A worker that aborts while it loads the model. The ninth one does not, so that the run ends in any case."""

    def _start(self, *arguments: Any) -> Any:
        with (self._job.cache.dir.parent / "aborted").open("a+") as file:
            file.seek(0)
            if len(file.read()) < 8:
                file.write("x")
                file.flush()
                os.abort()
        return super()._start(*arguments)


class Broken(LeaseWorker):
    """A worker with a fault of its own."""

    def _answer(self, prepared: Any) -> Any:
        raise ZeroDivisionError("a fault")


def run_with(place: Workplace, worker: type[LeaseWorker], observer: Recorder | None = None) -> Any:
    """Run the job with such workers, without the command line."""
    job = load_job(place.save())

    def executor(context: RunContext, inputs: Inputs, finished: FinishedDocuments) -> PoolExecutor:
        return PoolExecutor(context, inputs, finished, ProcessPool(job, 2, 1, worker))

    return Runner(job, observer or Recorder(), executor=executor).run()


# ---- what a run gives


def test_the_same_bytes_as_in_one_process(place: Workplace) -> None:
    result = invoke("run", place.job_file)
    assert result.exit_code == 0, result.output
    assert place.output.read_bytes() == alone(place)
    told = place.report()
    assert (told["state"], told["processes"], told["prefixes_built"], told["documents_done"]) == ("finished", 2, 8, 8)
    assert (told["workers"], told["restarts"]) == ({}, 0)
    assert told["prefilled_tokens"] == told["context_tokens"] > 1000
    assert json.loads(invoke("run", place.job_file, "--json").stdout)["rows_kept"] == 24
    place.output.unlink()
    assert json.loads(invoke("run", place.job_file, "--json").stdout)["prefixes_restored"] == 8
    assert place.output.read_bytes() == alone(place)


def test_queries_that_use_answers_give_the_same_bytes(place: Workplace) -> None:
    place.queries[2] |= {"text": "Who of {{ answers.what }}?", "when": "id != 'd1'"}
    place.queries.append({"id": "all", "text": "Which of these?", "previous": True})
    report = json.loads(invoke("run", place.save(), "--json").stdout)
    assert (report["rows"], report["rows_skipped"], report["rows_failed"]) == (32, 1, 0)
    assert place.output.read_bytes() == alone(place)
    place.queries[1]["text"] = "When does it begin?"  # so that what uses kept answers too is asked again
    assert json.loads(invoke("run", place.save(), "--json").stdout)["rows_kept"] == 15


def test_documents_that_share_a_batch_are_handed_out_together_and_dropped_with_the_last_answer(
    place: Workplace,
) -> None:
    place.tree["generation"] = {"max_tokens": 3, "batch_size": 8}
    assert invoke("run", place.save(), "--set", "cache.keep=job").exit_code == 0
    assert place.segments() == []
    assert place.output.read_bytes() == alone(place)


def test_rows_fail_as_in_one_process_or_stop_the_run(place: Workplace) -> None:
    place.documents = {"long": "word " * 3000, **place.documents}
    stopped = invoke("run", place.save(), "--fail-fast")
    assert stopped.exit_code == 1
    assert "stopped at the first failure: document 'long'" in stopped.stderr
    place.documents["blank"] = " "
    result = invoke("run", place.save())
    assert result.exit_code == 3
    assert "3 ContextTooLong" in result.stdout
    assert "3 EmptyDocument" in result.stdout
    assert place.output.read_bytes() == alone(place)


def test_a_lease_that_is_being_prepared_can_be_recalled(workplace: Workplace) -> None:
    """Preparing may take long, since it restores prefixes; another process may be idle meanwhile."""
    worker, begun, may_go_on, answered = LeaseWorker(load_job(workplace.job_file), 20), Event(), Event(), []

    class Engine:
        def prepare(self, task: Any) -> Any:
            begun.set()
            may_go_on.wait(60)
            return task

        def answer(self, prepared: Any) -> Any:
            answered.append(prepared)
            return []

        def take_stats(self) -> WorkStats:
            return WorkStats()

    worker._engine = Engine()  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as threads:
        replies = [threads.submit(worker.answer, number, [number]) for number in (0, 1)]  # type: ignore[list-item]
        assert begun.wait(60)
        worker.recall(1)
        may_go_on.set()
        assert [reply.result(60).results for reply in replies] == [[], None]
    assert answered == [[0]]


# ---- who dies


def test_a_process_that_is_killed_costs_nothing(place: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    (place.folder / "deaths-d1").write_text("1")
    observer = Recorder()
    assert run_with(place, Dying, observer).restarts == 1
    assert place.output.read_bytes() == alone(place)
    assert sum(observer.rows) == 24  # each is shown once
    assert "was killed by signal 9 (SIGKILL), probably out of memory, with document 'd1' in hand" in caplog.text
    assert "going on with 1 of the processes, because memory may be short" in caplog.text


def test_a_document_that_kills_its_process_twice_becomes_error_rows(place: Workplace) -> None:
    (place.folder / "deaths-d1").write_text("9")
    assert run_with(place, Dying).rows_failed == 3
    failed = {pair: row for pair, row in place.rows().items() if row["status"] == "error"}
    assert list(failed) == [("d1", query["id"]) for query in place.queries]
    assert {row["error_type"] for row in failed.values()} == {"ModelProcessDied"}
    place.run("scale.processes=1")
    assert place.output.read_bytes() == alone(place)


@pytest.mark.parametrize("worker", [Stillborn, Aborting])
def test_a_model_that_kills_every_process_ends_the_run(place: Workplace, worker: type[LeaseWorker]) -> None:
    with pytest.raises(PipelineError, match="died, twice, before a document was in hand"):
        run_with(place, worker)


def test_a_fault_in_a_process_ends_the_run_with_its_reason(place: Workplace) -> None:
    with pytest.raises(Exception, match=r"process [12]: .*a fault"):
        run_with(place, Broken)
    assert not multiprocessing.active_children()


def test_an_interrupted_run_is_resumed_to_the_same_bytes(place: Workplace) -> None:
    report = run_with(place, LeaseWorker, Interrupting(chunk=2))
    assert report.interrupted
    assert 0 < report.documents_done < 8
    assert invoke("run", place.job_file).exit_code == 0
    assert place.output.read_bytes() == alone(place)


class Backwards(LocalExecutor):
    """Yields the last group first, as several workers may. Notes the contexts that it still needs."""

    def execute(self, groups: Iterator[list[DocumentTask]]) -> Generator[GroupResult]:
        self.needed = len(list(self._labels_to_come()))
        yield from super().execute(reversed(list(groups)))


def test_a_process_that_dies_while_the_first_document_is_in_hand_leaves_none_out(workplace: Workplace) -> None:
    """Those behind it may be done already."""
    job, reports, finished = load_job(workplace.save()), list[Report](), FinishedDocuments()
    executors: list[Backwards] = []

    class DiesAfterOne(Recorder):
        def documents_done(self, document_ids: Sequence[str], report: Report) -> None:
            if reports:
                raise OSError("the process dies")
            reports.append(report)
            finished.add(document_ids)

    def executor(context: RunContext, inputs: Inputs, finished: FinishedDocuments) -> Backwards:
        executors.append(Backwards(context, inputs, finished))
        return executors[-1]

    with pytest.raises(OSError, match="the process dies"):
        Runner(job, DiesAfterOne(), executor=executor).run()
    assert reports[0].documents_done == 1
    report = Runner(job, Recorder(), report=reports[0], finished=finished, executor=executor).run()
    assert [each.needed for each in executors] == [3, 2]
    assert (report.documents_done, report.rows_answered + report.rows_kept, report.rows_failed) == (3, 9, 0)
    other = Workplace(workplace.folder / "undisturbed", workplace.model)
    other.run()
    assert workplace.answers() == other.answers()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_no_process_is_left(place: Workplace, number: signal.Signals, code: int) -> None:
    place.documents = {f"d{each}": f"Paper {each} says much. " * 30 for each in range(16)}
    command = [sys.executable, "-m", "pipeline.cli", "run", str(place.save()), "--quiet"]
    run = warm.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    wait_until(lambda: len(place.segments()) > 2)
    family = descendants(run.pid)
    assert len(family) >= 3  # the process that runs the job, and two with models
    run.send_signal(number)
    assert run.wait(60) == code
    wait_until(lambda: not any(is_running(pid) for pid in family))
    assert invoke("run", place.job_file).exit_code == 0
    assert place.output.read_bytes() == alone(place)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_second_signal_ends_a_run_and_its_processes_at_once(place: Workplace) -> None:
    place.documents = {f"d{each}": f"Paper {each} says much. " * 30 for each in range(200)}
    command = [sys.executable, "-m", "pipeline.cli", "run", str(place.save()), "--quiet"]
    run = warm.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    wait_until(lambda: len(place.segments()) > 2)
    family = descendants(run.pid)
    run.send_signal(signal.SIGTERM)
    time.sleep(0.05)  # signals that come at the same time count as one
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 130
    wait_until(lambda: not any(is_running(pid) for pid in family))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_do_not_change_the_exit_code_of_a_run_that_is_ending(place: Workplace, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "run", str(place.save()), "--quiet"]
    run = warm.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    wait_until(lambda: len(place.segments()) > 0)
    while run.poll() is None:
        run.send_signal(number)
        time.sleep(0.001)
    assert run.returncode == 130


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in children for each in (int(child), *descendants(int(child)))]


# ---- how many


@pytest.mark.parametrize(
    ("overrides", "memory", "weights", "device", "expected"),
    [
        ([], 64 * GIB, GIB, "cpu", (8, 1)),
        ([], 16 * GIB, GIB, "cpu", (4, 2)),  # half of the memory holds four
        ([], GIB, GIB, "cpu", (1, 8)),
        ([], 64 * GIB, 1 << 20, "cpu", (1, 8)),  # it would have answered before a second process has started
        ([], 64 * GIB, GIB, "gpu", (1, 8)),
        (["documents.limit=3"], 64 * GIB, GIB, "cpu", (3, 2)),
        (["generation.batch_size=24"], 64 * GIB, GIB, "cpu", (1, 8)),  # all rows share a batch
        (["scale.processes=3"], GIB, GIB, "gpu", (3, 2)),
        (["scale.processes=99"], GIB, GIB, "cpu", (8, 1)),
        (["scale.processes=1"], 64 * GIB, GIB, "cpu", (1, 8)),
    ],
)
def test_how_many_processes_and_threads(
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    memory: int,
    weights: int,
    device: str,
    expected: tuple[int, int],
) -> None:
    workplace.documents |= {f"e{number}": "A text. " for number in range(5)}
    job = load_job(workplace.save(), overrides)
    monkeypatch.setattr(process_pool, "usable_memory", lambda: memory)
    monkeypatch.setattr(process_pool, "weights_bytes", lambda folder, config: weights)
    assert share_cores(job, Inputs(job), cores=8, on_cpu=device == "cpu") == expected


def test_ranks_are_processes_already(workplace: Workplace) -> None:
    result = invoke("run", workplace.job_file, "--set", "scale.ranks=2", "--set", "scale.processes=2")
    assert result.exit_code == 2
    assert "scale.processes: the ranks of one model are processes already; leave it out" in result.stderr
