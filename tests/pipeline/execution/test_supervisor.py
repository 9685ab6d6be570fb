"""A run whose model's process is killed, over and over: what is lost, what is said, and who outlives whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest

from pipeline.execution.supervisor import _main_module_hidden
from tests import ROOT, warm
from tests.pipeline.workplace import Workplace

# The command line, with a model's process that does FATE in a call of TARGET. The first such process does it in the
# first number of CALLS, and so on; those that come after the last number live. Being the main script, this is also
# imported by the processes that are spawned.
MAIN = """
import importlib, os, signal, sys, time
from pathlib import Path
from threading import Event, Thread
from turboquant.runtime.blas import load_tuned_blas

load_tuned_blas()
folder = Path(os.environ["FOLDER"])

def note(name, line):
    with open(folder / name, "a") as file:
        print(line, file=file)

def count(name):
    return len((folder / name).read_text().splitlines()) if (folder / name).exists() else 0

def patch(target, around):
    module, path = target.split(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(real, *args, **kwargs))

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def leave():
    sys.exit(3)

def abort():
    os.abort()

def fail():
    raise LookupError("on\\ntwo lines")

def hang():
    print(os.getpid(), flush=True)
    while True:
        signal.pause()

def turn_deaf():
    # print would raise if the signal came while hang prints
    signal.signal(signal.SIGINT, lambda *_: os.write(1, b"no\\n"))
    hang()

if __name__ == "__mp_main__":
    calls, fates = 0, [int(number) for number in os.environ["CALLS"].split()]
    life = count("lives")
    note("lives", os.getpid())

    def fated(real, *args, **kwargs):
        global calls
        calls += 1
        if life < len(fates) and calls == fates[life]:
            globals()[os.environ["FATE"]]()
        return real(*args, **kwargs)

    def committing(real, self, group):
        real(self, group)
        self._wait()  # for the rows, which a kill at once may otherwise cost

    def beginning(real, self, prompt):
        note("begun", prompt.task.document_id)
        return real(self, prompt)

    patch("pipeline.execution.commit:Committer.commit", committing)
    patch("pipeline.execution.engine:Engine._with_prefix", beginning)
    if os.environ["TARGET"]:
        patch(os.environ["TARGET"], fated)
    elif life < len(fates):
        print("importing", flush=True)
        while not signal.sigpending():
            time.sleep(0.01)

if __name__ == "__main__":
    def counting(real, self, rows):
        note("shown", rows)
        real(self, rows)

    patch("pipeline.progress:Progress.rows_done", counting)
    from pipeline.cli import main
    main()
"""


class Supervised(Workplace):
    """A workplace whose jobs are run by the command line, in processes that are fated to die."""

    def start(self, fate: str, target: str, calls: str, *options: str) -> subprocess.Popen[str]:
        main = self.folder / "main.py"
        main.write_text(MAIN)
        environment = {"FOLDER": str(self.folder), "FATE": fate, "TARGET": target, "CALLS": calls}
        return warm.Popen(
            [sys.executable, str(main), "run", str(self.save()), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            start_new_session=True,
        )

    def noted(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def killed(tmp_path: Path, tiny_model: Path) -> Supervised:
    return Supervised(tmp_path / "killed", tiny_model)


@pytest.mark.parametrize(
    ("fate", "target", "call", "begun", "how"),
    [
        (
            "kill",
            "pipeline.execution.prefixes:PrefixProvider._chunk_done",
            "2",
            "d0 d1 d1 d2",
            "was killed by signal 9 (SIGKILL)",
        ),
        (
            "kill",
            "pipeline.execution.engine:Engine._show_row",
            "5",
            "d0 d1 d1 d2",
            "was killed by signal 9 (SIGKILL)",
        ),
        (
            "abort",
            "pipeline.execution.engine:Engine._show_row",
            "7",
            "d0 d1 d2 d2",
            "was killed by signal 6 (SIGABRT)",
        ),
        ("leave", "pipeline.execution.engine:load_identified", "1", "d0 d1 d2", "ended with exit status 3"),
        ("kill", "pipeline.output.results:Results.finish", "1", "d0 d1 d2", "was killed by signal 9 (SIGKILL)"),
    ],
)
def test_a_process_that_dies_once_changes_nothing(
    workplace: Workplace, killed: Supervised, fate: str, target: str, call: str, begun: str, how: str
) -> None:
    process = killed.start(fate, target, call)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert killed.noted("begun") == begun.split()
    (line,) = [line for line in error.splitlines() if "the model's process" in line]
    assert line.startswith(f"the model's process {how}")
    assert line.endswith("starting it again")
    report = workplace.run()
    assert killed.output.read_bytes() == workplace.output.read_bytes()
    told = killed.report()
    assert told["restarts"] == 1
    for name in ("rows", "rows_kept", "rows_answered", "rows_failed", "documents_done", "answer_tokens"):
        assert told[name] == getattr(report, name), name
    assert "9 answered, 0 kept, 0 failed of 9 (3 documents)" in out
    assert "restarts  1 of the model's process" in out
    assert sum(map(int, killed.noted("shown"))) == 9


def test_rows_that_an_earlier_run_answered_stay_kept(killed: Supervised) -> None:
    killed.run()
    killed.documents["d1"] += "And more."
    process = killed.start("kill", "pipeline.execution.engine:Engine._show_row", "2")
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert [killed.report()[name] for name in ("rows_kept", "rows_answered", "restarts")] == [6, 3, 1]
    assert sum(map(int, killed.noted("shown"))) == 9


@pytest.mark.parametrize(
    ("fate", "how"),
    [
        ("kill", "was killed by signal 9 (SIGKILL), probably out of memory, twice"),
        ("leave", "ended with exit status 3"),
    ],
)
def test_a_document_that_kills_the_process_twice_becomes_error_rows(
    workplace: Workplace, killed: Supervised, fate: str, how: str
) -> None:
    process = killed.start(fate, "pipeline.execution.prefixes:PrefixProvider._chunk_done", "2 1")
    out, error = process.communicate()
    assert process.returncode == 3, error
    assert "3 ModelProcessDied" in out
    assert len(killed.noted("lives")) == 3
    assert killed.noted("begun") == ["d0", "d1", "d1", "d2"]
    rows = killed.rows()
    failed = {pair: row for pair, row in rows.items() if row["status"] == "error"}
    assert list(failed) == [("d1", query["id"]) for query in killed.queries]
    for row in failed.values():
        assert row["error_type"] == "ModelProcessDied"
        assert how in row["error"]
        assert "generation.batch_size" in row["error"]
    assert killed.report()["failures"] == {"ModelProcessDied": 3}
    assert killed.report()["restarts"] == 2
    workplace.run()
    assert {pair: row for pair, row in rows.items() if pair not in failed} == {
        pair: row for pair, row in workplace.rows().items() if pair not in failed
    }
    again = killed.run()
    assert (again.rows_kept, again.rows_answered) == (6, 3)
    assert killed.output.read_bytes() == workplace.output.read_bytes()


def test_documents_that_share_a_batch_are_tried_alone_before_one_is_to_blame(
    workplace: Workplace, killed: Supervised
) -> None:
    # Twice amid the answers of all three; then d1, by itself, twice.
    killed.tree["generation"] = {"max_tokens": 5, "batch_size": 9}
    process = killed.start("kill", "pipeline.execution.engine:Engine._show_row", "5 2 4 1")
    _, error = process.communicate()
    assert process.returncode == 3, error
    assert "with document 'd0' and 2 more in hand again; each is tried by itself" in error
    failed = Counter(document for (document, _), row in killed.rows().items() if row["status"] == "error")
    assert failed == {"d1": 3}
    assert killed.report()["restarts"] == 4
    assert sum(map(int, killed.noted("shown"))) == 9
    workplace.run()
    killed.tree["generation"] = workplace.tree["generation"]
    killed.run()
    assert killed.output.read_bytes() == workplace.output.read_bytes()


@pytest.mark.parametrize(("chunks", "lost", "restarts"), [("1 1", "d0", 2), ("2 1 1 1", "d1", 4)])
def test_the_document_whose_prefill_kills_the_process_is_to_blame(
    killed: Supervised, chunks: str, lost: str, restarts: int
) -> None:
    # The prefixes that are in memory already may be to blame too, so d0 and d1 are tried alone before d1 is lost.
    killed.tree["generation"] = {"max_tokens": 5, "batch_size": 9}
    process = killed.start("kill", "pipeline.execution.prefixes:PrefixProvider._chunk_done", chunks)
    _, error = process.communicate()
    assert process.returncode == 3, error
    failed = Counter(document for (document, _), row in killed.rows().items() if row["status"] == "error")
    assert failed == {lost: 3}
    assert killed.report()["restarts"] == restarts


def test_every_document_has_its_own_deaths(killed: Supervised) -> None:
    # d0 twice, d1 once, and d2 twice again.
    process = killed.start("kill", "pipeline.execution.engine:Engine._show_row", "1 1 2 4 1")
    _, error = process.communicate()
    assert process.returncode == 3, error
    failed = Counter(document for (document, _), row in killed.rows().items() if row["status"] == "error")
    assert failed == {"d0": 3, "d2": 3}
    assert killed.report()["restarts"] == 5
    assert sum(map(int, killed.noted("shown"))) == 9


def test_a_process_whose_workers_answer_may_die_too(workplace: Workplace, killed: Supervised) -> None:
    process = killed.start("kill", "pipeline.execution.commit:Committer.commit", "2", "--set", "scale.processes=2")
    _, error = process.communicate()
    assert process.returncode == 0, error
    (line,) = [line for line in error.splitlines() if "the model's process" in line]
    assert line.endswith("after work on documents had begun; starting it again")
    workplace.run()
    assert killed.output.read_bytes() == workplace.output.read_bytes()
    assert [killed.report()[name] for name in ("documents_done", "rows_failed", "restarts")] == [3, 0, 1]
    assert sum(map(int, killed.noted("shown"))) == 9


@pytest.mark.parametrize(
    ("target", "where", "begun"),
    [
        ("pipeline.execution.engine:load_identified", "before a document was in hand", True),
        ("pipeline.execution.runner:Inputs", "before a document was in hand", False),
        ("pipeline.output.results:Results.finish", "while the result was written", True),
    ],
)
def test_a_process_that_dies_without_a_document_is_tried_twice(
    killed: Supervised, target: str, where: str, begun: bool
) -> None:
    process = killed.start("kill", target, "1 1 1 1")
    out, error = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert len(killed.noted("lives")) == 2
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "the model's process was killed by signal 9 (SIGKILL)" in line
    assert where in line
    assert "Traceback" not in error
    if begun:
        assert (killed.report()["state"], killed.report()["error"]) == ("failed", line.removeprefix("error: "))
    assert killed.run().rows == 9


def test_an_unforeseen_error_is_one_line_and_no_death(killed: Supervised) -> None:
    process = killed.start("fail", "pipeline.execution.runner:Inputs", "1")
    out, error = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert error == "error: LookupError: on two lines (--debug shows where)\n"


def test_debug_shows_where_the_process_failed(killed: Supervised) -> None:
    process = killed.start("fail", "pipeline.execution.runner:Inputs", "1", "--debug")
    _, error = process.communicate()
    assert process.returncode == 1
    assert "in fail\n" in error
    assert "LookupError: on\ntwo lines" in error


def test_a_killed_parent_takes_the_process_along(killed: Supervised) -> None:
    process = killed.start("hang", "pipeline.execution.engine:Engine._show_row", "4")
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=60)  # returns when nobody is left who could write
    assert killed.run().rows_kept == 3


# ---- signals


def stderr_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return line
    raise AssertionError(f"the process ended without saying: {words}")


@pytest.mark.parametrize("send", [os.kill, os.killpg])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(
    killed: Supervised, send: Callable[[int, int], None], number: signal.Signals
) -> None:
    process = killed.start("hang", "pipeline.execution.engine:Engine._show_row", "4")
    assert process.stdout is not None
    process.stdout.readline()
    send(process.pid, number)
    assert (
        stderr_until(process, "interrupted")
        == "interrupted: the rows in hand are finished first; interrupt again to stop at once\n"
    )
    send(process.pid, number)
    out, error = process.communicate()
    assert (process.returncode, out, error) == (130, "", "interrupted; the same command resumes\n")
    assert len(killed.noted("lives")) == 1
    assert killed.run().rows_kept == 3


def test_the_third_signal_stops_a_process_that_is_deaf(killed: Supervised) -> None:
    process = killed.start("turn_deaf", "pipeline.execution.engine:Engine._show_row", "4")
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "no\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert error.endswith("interrupted; the same command resumes\n")
    assert killed.report()["state"] == "interrupted"
    assert killed.run().rows_kept == 3


def test_a_signal_that_comes_before_the_process_is_ready(killed: Supervised) -> None:
    process = killed.start("", "", "1")
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate()
    assert (process.returncode, out, error) == (130, "", "interrupted; the same command resumes\n")
    assert killed.noted("begun") == []


def test_a_process_that_dies_when_asked_to_stop_is_no_death(killed: Supervised) -> None:
    process = killed.start("hang", "pipeline.execution.engine:Engine._show_row", "4")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    stderr_until(process, "interrupted: the rows")
    os.kill(child, signal.SIGKILL)
    _, error = process.communicate()
    assert (process.returncode, error) == (130, "interrupted; the same command resumes\n")
    assert len(killed.noted("lives")) == 1


# ---- the parent


def test_runs_in_two_threads_put_the_main_module_back() -> None:
    main, may_leave, is_hidden = sys.modules["__main__"], Event(), Event()

    def hide() -> None:
        with _main_module_hidden():
            is_hidden.set()
            may_leave.wait(60)

    other = Thread(target=hide)
    try:
        with _main_module_hidden():
            other.start()
            is_hidden.wait(0.2)
        may_leave.set()
        other.join()
        assert sys.modules["__main__"] is main
    finally:
        sys.modules["__main__"] = main


def test_the_parent_imports_no_mlx(workplace: Workplace) -> None:
    code = (
        "import json, sys\n"
        "from pipeline.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as done:\n    assert not done.code\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(workplace.job_file), "--quiet"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert not {"mlx", "mlx_lm", "numpy", "pyarrow", "transformers"} & set(json.loads(done.stdout))
    assert workplace.report()["rows_answered"] == 9
