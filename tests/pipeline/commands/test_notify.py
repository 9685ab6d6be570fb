"""``run --notify CMD`` tells of a run's end, whatever it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ROOT, warm
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace


@pytest.fixture
def told(workplace: Workplace) -> Path:
    """The file to which `notify` writes the run's exit code and its state, as run.json has it."""
    (workplace.folder / "notify").write_text(
        f"#!/bin/sh\necho to stdout\necho \"$PIPELINE_EXIT_CODE $1 $2\" > '{workplace.folder}/told'\n"
    )
    (workplace.folder / "notify").chmod(0o700)
    return workplace.folder / "told"


def run(place: Workplace, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", "run", str(place.job_file), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return warm.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_run_that_ends_well_is_told_with_the_path_of_its_run_file(workplace: Workplace, told: Path) -> None:
    done = run(workplace, "--json", "--notify", f"'{workplace.folder}/notify' 'two words'")
    assert done.returncode == 0, done.stderr
    assert told.read_text() == f"0 two words {workplace.output}.run.json\n"
    assert "to stdout" in done.stderr
    assert json.loads(done.stdout)["rows_answered"] == 9


@pytest.mark.usefixtures("here")
def test_failed_rows_and_errors_are_told_with_their_exit_codes(workplace: Workplace, told: Path) -> None:
    notify = ["--notify", f"'{workplace.folder}/notify' x", "--quiet"]
    workplace.documents["d1"] = ""
    assert invoke("run", workplace.save(), *notify).exit_code == 3
    assert told.read_text().startswith("3 x ")
    workplace.save(documents={"path": "gone.parquet"})
    assert invoke("run", workplace.job_file, *notify).exit_code == 2
    assert told.read_text().startswith("2 x ")


def test_an_interrupted_run_is_told(workplace: Workplace, told: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "run", str(workplace.job_file)]
    command += ["--notify", f"'{workplace.folder}/notify' x"]
    with warm.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE) as process:
        while not workplace.output.with_name("a.parquet.lock").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 130
    assert told.read_text().startswith("130 x ")


@pytest.mark.usefixtures("here")
def test_a_command_that_fails_is_told_and_leaves_the_exit_code_as_it_is(workplace: Workplace) -> None:
    result = invoke("run", workplace.job_file, "--notify", "false")
    assert result.exit_code == 0
    assert "--notify false: it ended with exit status 1" in result.stderr


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", ["no-such-command", "", "'open"])
def test_a_command_that_is_not_there_is_an_error_before_anything_is_run(workplace: Workplace, command: str) -> None:
    assert f"--notify {command}: " in error_of(invoke("run", workplace.job_file, "--notify", command))
    assert not workplace.output.exists()
