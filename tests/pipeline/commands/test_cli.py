"""The command line: exit codes, what is printed, and errors as a newcomer reads them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

from pipeline import __version__
from pipeline.cli import app
from tests import warm
from tests.pipeline.command_line import ROOT, error_of, invoke
from tests.pipeline.workplace import Workplace

COMMANDS = ("run", "plan", "status")


# ---- help


def test_every_command_has_a_help_text() -> None:
    command: Any = typer.main.get_command(app)
    assert set(COMMANDS) <= set(command.commands)
    for name, each in command.commands.items():
        assert each.help, name
        assert all(parameter.help for parameter in each.params if parameter.name != "help"), name
        assert invoke(name, "--help").exit_code == 0
    assert all(name in invoke("--help").stdout for name in command.commands)


def test_the_list_of_commands_is_not_cut() -> None:
    for arguments in (["--help"], ["cache", "--help"]):
        listed = invoke(*arguments).stdout.partition("Commands:")[2]
        assert "..." not in listed
        assert all(line.rstrip().endswith(".") for line in re.split(r"\n(?=  \w)", listed.strip("\n")))


def test_the_version() -> None:
    assert invoke("--version").stdout == f"turboquant-pipeline {__version__}\n"


def test_help_imports_nothing_slow() -> None:
    code = (
        "import json, sys\n"
        "from pipeline.cli import app\n"
        "try:\n    app(['--help'], prog_name='pipeline')\n"
        "except SystemExit as done:\n    assert not done.code\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "Usage: pipeline" in done.stdout
    slow = {"mlx", "mlx_lm", "pyarrow", "transformers", "numpy", "pydantic"}
    assert not slow & set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["rum", "job.yaml"], ["run"], ["run", "job.yaml", "--qiet"], ["run", "--set"]])
def test_a_wrong_command_line(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error:" in result.stderr
    assert "Traceback" not in result.stderr


# ---- bad input


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("generation.max_token=3", "--set generation.max_token=3: unknown key 'generation.max_token'; did you mean"),
        ("cache.key_bits=7", "cache.key_bits: expected 2, 3, 4, 5, 6, 8 or 16, got 7"),
        ("generation.batch_size=0", "generation.batch_size: expected at least 1, got 0"),
        ("retries=-1", "retries: expected at least 0, got -1"),
        ("nonsense", "expected key.path=value, such as generation.max_tokens=64"),
        ("queries.7.text=x", "'queries' is a list of 3: use queries.0 to queries.2"),
        ("documents.path=nix.parquet", "nix.parquet does not exist"),
        ("documents.text=txt", "documents.text names the column 'txt', which "),
        ("documents.id=Id", "did you mean 'id'?"),
        ("prompt.context='{{ txt }}'", "the prompt uses the column 'txt', which "),
        ("prompt.context='{{ text'", "prompt.context: line 1 of the template"),
        ("prompt.context=text", "prompt.context uses no column"),
        ("model=nix", "there is no folder"),
        ("output.path=out.xlsx", "output.path ends in .xlsx; results are written as Parquet (*.parquet), CSV (*.csv)"),
        ("output.path=s3://bucket/out.JSON", "output.path ends in .json; results are written as Parquet"),
    ],
)
def test_a_wrong_key_or_value(workplace: Workplace, command: str, override: str, words: str) -> None:
    assert words in error_of(invoke(command, workplace.job_file, "--set", override))
    assert not workplace.output.exists()
    assert not workplace.cache.exists()


def _misspell_a_key(workplace: Workplace) -> None:
    workplace.job_file.write_text(workplace.job_file.read_text().replace("max_tokens: 5", "max_token: 5"))


def _break_the_yaml(workplace: Workplace) -> None:
    workplace.job_file.write_text("model: [")


def _remove_the_documents(workplace: Workplace) -> None:
    (workplace.folder / "docs.parquet").rename(workplace.folder / "dogs.parquet")


def _empty_the_documents(workplace: Workplace) -> None:
    workplace.documents = {}
    workplace.save()


def _repeat_an_id(workplace: Workplace) -> None:
    pq.write_table(pa.table({"id": ["a", "b", "a"], "text": ["x", "y", "z"]}), workplace.folder / "docs.parquet")


def _write_text_for_parquet(workplace: Workplace) -> None:
    (workplace.folder / "docs.parquet").write_text("id,text\n")


def _remove_the_weights(workplace: Workplace) -> None:
    model = shutil.copytree(workplace.model, workplace.folder / "bare")
    (model / "model.safetensors").unlink()
    workplace.save(model="bare")


def _remove_the_tokenizer(workplace: Workplace) -> None:
    model = shutil.copytree(workplace.model, workplace.folder / "bare")
    (model / "tokenizer.json").unlink()
    workplace.save(model="bare")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_misspell_a_key, ["job.yaml: unknown key 'generation.max_token'; did you mean 'max_tokens'?"]),
        (_break_the_yaml, ["job.yaml: line 1, column "]),
        (_remove_the_documents, ["documents.path: ", "docs.parquet does not exist; did you mean 'dogs.parquet'?"]),
        (_empty_the_documents, ["documents.path: no documents: 1 file at ", "docs.parquet with no rows"]),
        (_repeat_an_id, ["documents.id: the id 'a' is given twice, in row 0 ", "and in row 2 (from 0) of "]),
        (_write_text_for_parquet, ["docs.parquet: cannot be read as Parquet: "]),
        (_remove_the_weights, ["bare: no weights (model*.safetensors); convert other formats with "]),
        (_remove_the_tokenizer, ["bare: no tokenizer (tokenizer.json); "]),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_wrong_files(workplace: Workplace, command: str, spoil: Callable[[Workplace], None], words: list[str]) -> None:
    spoil(workplace)
    line = error_of(invoke(command, workplace.job_file))
    assert all(part in line for part in words), line
    assert not workplace.output.exists()


def test_a_missing_job_file(workplace: Workplace) -> None:
    line = error_of(invoke("run", workplace.folder / "jop.yaml"))
    assert line == f"{workplace.folder / 'jop.yaml'}: no such job file; did you mean 'job.yaml'?"


def test_debug_shows_a_traceback(workplace: Workplace) -> None:
    result = invoke("run", workplace.folder / "nix.yaml", "--debug")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "JobError"


def test_an_unforeseen_error_is_one_line(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise LookupError("on\ntwo lines")

    monkeypatch.setattr("pipeline.commands.plan.plan_job", fail)
    result = invoke("plan", workplace.job_file)
    assert result.exit_code == 1
    assert result.stderr == "error: LookupError: on two lines (--debug shows where)\n"


# ---- commands


def test_run_tells_what_it_did_and_where_the_result_is(workplace: Workplace) -> None:
    result = invoke("run", workplace.job_file)
    assert result.exit_code == 0
    assert "9 answered, 0 kept, 0 failed of 9 (3 documents)" in result.stdout
    assert "3 built, 0 restored" in result.stdout
    assert str(workplace.output) in result.stdout
    again = invoke("run", workplace.job_file, "--quiet")
    assert (again.exit_code, again.output) == (0, "")


def test_run_as_json_is_the_report(workplace: Workplace) -> None:
    workplace.documents["blank"] = ""
    result = invoke("run", workplace.save(), "--json")
    assert result.exit_code == 3
    printed = json.loads(result.stdout)
    assert printed["failures"] == {"EmptyDocument": 3}
    assert {name: workplace.report()[name] for name in printed} == printed


def test_failed_rows_end_in_exit_code_3(workplace: Workplace) -> None:
    workplace.documents["blank"] = " "
    result = invoke("run", workplace.save())
    assert result.exit_code == 3
    assert "3 EmptyDocument" in result.stdout
    assert invoke("status", workplace.job_file).stdout.splitlines()[:2] == [
        "documents  4",
        "rows       12: 9 done, 3 failed, 0 left",
    ]


def test_set_overrides_the_job(workplace: Workplace) -> None:
    other = workplace.folder / "other.parquet"
    result = invoke("run", workplace.job_file, "--set", f"output.path={other}", "--set", "generation.max_tokens=1")
    assert result.exit_code == 0
    assert not workplace.output.exists()
    assert set(pq.read_table(other)["answer_tokens"].to_pylist()) <= {0, 1, 2, 3}
    assert pq.read_table(other)["answer_tokens"].to_pylist()[0] <= 1


def test_plan_and_status_print_tables_or_json(workplace: Workplace) -> None:
    workplace.documents["blank"] = ""
    table = invoke("plan", workplace.save())
    assert table.exit_code == 0
    assert "12: 0 done, 12 to do" in table.stdout
    assert "0 in the store, 3 to build" in table.stdout
    assert "documents: 1 blank or not fit for the prompt" in table.stdout
    planned = json.loads(invoke("plan", workplace.job_file, "--json").stdout)
    assert (planned["misses"], planned["status"]["rows"]) == (3, 12)
    counted = json.loads(invoke("status", workplace.job_file, "--json").stdout)
    cut = {"rows": 0, "queries": {}, "max_tokens": {}}
    nothing_done = {"done": 0, "failed": 0, "skipped": 0, "left": 12}
    assert counted == {"documents": 4, "rows": 12, "cut": cut, **nothing_done}


def test_an_estimated_plan_says_so(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.inputs.token_counter import Effort

    monkeypatch.setattr("pipeline.commands.plan.Effort", lambda: Effort(0, 0))
    shown = invoke("plan", workplace.job_file).stdout
    assert "3 (about " in shown
    assert "prefill    about " in shown
    assert "disk       about " in shown
    assert json.loads(invoke("plan", workplace.job_file, "--json").stdout)["estimated"] is True
    monkeypatch.undo()
    assert "about" not in invoke("plan", workplace.job_file).stdout


def test_a_result_that_another_run_writes(workplace: Workplace) -> None:
    from pipeline.output.results import Results

    with Results(workplace.output):
        result = invoke("run", workplace.job_file)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {workplace.output}: another run is writing this result; wait for it")
    assert len(result.stderr.splitlines()) == 1


# ---- as processes


def start(*arguments: str | Path, main: tuple[str, ...] = ("-m", "pipeline.cli")) -> subprocess.Popen[str]:
    return warm.Popen(
        [sys.executable, *main, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def test_bad_input_as_a_user_sees_it(workplace: Workplace) -> None:
    _remove_the_weights(workplace)
    process = start("run", workplace.job_file)
    out, error = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert len(error.splitlines()) == 1
    assert error.startswith("error: model ")


# The model's process imports this too, so it answers as slowly.
INTERRUPTIBLE = """
import time
from turboquant.runtime.blas import load_tuned_blas
load_tuned_blas()
from pipeline.execution import engine
real = engine.Engine._show_row
def slowly(self):
    real(self)
    print("answered", flush=True)
    time.sleep(0.3)
engine.Engine._show_row = slowly
if __name__ == "__main__":
    from pipeline.cli import main
    main()
"""


@pytest.mark.parametrize("send", [os.kill, os.killpg])  # from a program, and from a terminal
def test_an_interrupted_run_says_how_to_resume(workplace: Workplace, send: Callable[[int, int], None]) -> None:
    main = workplace.folder / "main.py"
    main.write_text(INTERRUPTIBLE)
    process = start("run", workplace.job_file, main=(str(main),))
    assert process.stdout is not None
    for _ in range(4):
        assert process.stdout.readline() == "answered\n"
    send(process.pid, signal.SIGINT)
    out, error = process.communicate()
    assert process.returncode == 130, error
    assert error.splitlines() == [
        "interrupted: the rows in hand are finished first; interrupt again to stop at once",
        f"interrupted; to resume: pipeline run {workplace.job_file}",
    ]
    # The document in hand is finished, and nothing else is begun.
    assert out.count("answered\n") == 2
    assert "6 answered, 0 kept, 0 failed of 9" in out
    assert workplace.run().rows_kept == 6
    resumed = workplace.output.read_bytes()
    workplace.output.unlink()
    workplace.run()
    assert workplace.output.read_bytes() == resumed


def test_a_traceback_where_it_is_asked_for(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("pipeline.commands.plan.plan_job", fail)
    assert "error: ZeroDivisionError: a defect (--debug shows where)" in invoke("plan", workplace.job_file).stderr
    found = invoke("plan", workplace.job_file, "--debug").exception
    assert isinstance(found, ZeroDivisionError)


def test_a_model_of_several_processes_is_not_run_on_ray(workplace: Workplace) -> None:
    told = error_of(invoke("run", workplace.job_file, "--on", "ray", "--set", "scale.ranks=2"))
    assert told.startswith("scale.ranks: ")
