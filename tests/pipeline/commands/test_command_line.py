"""Commands that are printed can be run as printed: with all that the user gave, quoted for a shell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.commands.console import quoted
from tests import ROOT, warm
from tests.pipeline.command_line import PROGRAM
from tests.pipeline.workplace import Workplace

OTHER = 'the $HOME\'s "new" out'  # a folder that a shell would read otherwise, were it not quoted
OPTIONS = ["--set", f"output.path={OTHER}/a.parquet", "--set", "prompt.system='one\n\n two: it''s \\n'"]


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """A job of an awkward name, whose first document fails."""
    workplace.documents = {"blank": "", **workplace.documents}
    workplace.save().rename(workplace.folder / "-my job's.yaml")
    workplace.output = workplace.folder / OTHER / "a.parquet"
    return workplace


def pipeline(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return as_bash_reads(quoted([*PROGRAM.split(), *arguments]), folder)


def as_bash_reads(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the program with the arguments that bash finds in a command, and in the folder that it goes to."""
    words = bash(f'words() {{ printf "%s\\0" "$PWD" "$@"; }}; {command.replace(PROGRAM, "words")}', folder).stdout
    place, *arguments = words.split("\0")[:-1]
    return warm.run([*PROGRAM.split(), *arguments], cwd=place)


def bash(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_command_to_resume_resumes_the_same_job_the_same_way(place: Workplace) -> None:
    options = [
        *OPTIONS,
        "--shard",
        "1/1",
        "--log-format",
        "text",
        "--keep-failed",
        "--fail-fast",
        "--metrics",
        "m.prom",
    ]
    stopped = pipeline("run", "./-my job's.yaml", *options, folder=place.folder)
    assert stopped.returncode == 1, stopped.stderr
    (again,) = re.findall(r"to resume: (.*)", stopped.stderr)
    for option in ("--keep-failed", "--fail-fast", "--log-format text", "--metrics m.prom", "--shard 1/1"):
        assert f" {option}" in again
    place.documents["blank"] = "It is not blank any more."
    place.save()
    resumed = as_bash_reads(again, place.folder)
    assert resumed.returncode == 0, resumed.stderr
    assert "12 answered, 0 kept, 0 failed of 12" in resumed.stdout
    (finished,) = place.output.parent.glob("a.parquet.shards/*.run.json")
    told = json.loads(finished.read_text())
    assert told["command"] == f"cd {quoted([str(place.folder)])} && {again}"
    kept = as_bash_reads(told["command"], Path("/"))
    assert "0 answered, 12 kept, 0 failed of 12" in kept.stdout


def test_the_commands_to_look_at_answers_and_failures_next(place: Workplace) -> None:
    ran = pipeline("run", "./-my job's.yaml", *OPTIONS, folder=place.folder)
    assert ran.returncode == 3, ran.stderr
    (failed,) = re.findall(r"to see them: (.*)", ran.stdout)
    assert as_bash_reads(failed, place.folder).stdout.count("EmptyDocument") == 3
    (shown,) = re.findall(r"^next +(.*)", ran.stdout, re.MULTILINE)
    assert len(as_bash_reads(shown, place.folder).stdout.splitlines()) == 12


def test_errors_name_commands_that_put_things_right(place: Workplace) -> None:
    job = ["./-my job's.yaml", *OPTIONS]
    nothing = pipeline("show", *job, "--query", "what", folder=place.folder).stderr
    (run,) = re.findall(r"no answers yet; (.*) makes them", nothing)
    first = pipeline("run", *job, "--shard", "1/2", "--quiet", folder=place.folder)
    assert first.returncode in (0, 3), first.stderr
    missing = pipeline("merge", *job, folder=place.folder).stderr
    (second,) = re.findall(r"not done: 2/2; to put that right: (.*)", missing)
    assert as_bash_reads(second, place.folder).returncode in (0, 3)
    unmerged = pipeline("show", *job, folder=place.folder).stderr
    (merge,) = re.findall(r"no answers yet; (.*) takes them", unmerged)
    assert as_bash_reads(merge, place.folder).returncode == 3
    place.output.unlink()
    assert as_bash_reads(run, place.folder).returncode == 3
    assert place.output.exists()


def test_init_and_plan_say_what_comes_next(place: Workplace) -> None:
    begun = pipeline("init", "docs.parquet", "a b/job.yaml", "--model", str(place.model), folder=place.folder)
    (plan,) = re.findall("next: (.*)", begun.stdout)
    planned = as_bash_reads(f"{plan} --set generation.max_tokens=3", place.folder)
    (run,) = re.findall(r"^next +(.*)", planned.stdout, re.MULTILINE)
    assert as_bash_reads(run, place.folder).returncode == 3  # the first document is empty
    assert (place.folder / "a b" / "out" / "job.parquet").exists()
    (here,) = re.findall("In this folder, (.*) says", (place.folder / "a b" / "job.yaml").read_text())
    assert here == "pipeline plan job.yaml"


@pytest.mark.parametrize("script", [".venv/bin/pipeline", "bin/pipeline"])
def test_a_command_that_is_not_on_the_path_is_named_by_its_own(place: Workplace, script: str) -> None:
    program = place.folder / script
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\nfrom pipeline.cli import main\nif __name__ == '__main__':\n    main()\n")
    program.chmod(0o755)
    begun = bash(f"{script} init docs.parquet --model {place.model}", place.folder)
    assert begun.stdout.splitlines()[-1] == f"next: {script} plan job.yaml"
    begun = bash(
        f"PATH=$PWD/{program.parent.relative_to(place.folder)}:$PATH; pipeline init docs.parquet b.yaml", place.folder
    )
    assert begun.stdout.splitlines()[-1] == "next: pipeline plan b.yaml"


def test_a_pipeline_py_of_the_user_hides_nothing_from_the_command(workplace: Workplace) -> None:
    (workplace.folder / "pipeline.py").write_text("raise SystemExit('the wrong module')")
    program = workplace.folder / "bin" / "pipeline"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom pipeline.cli import main\nif __name__ == '__main__':\n    main()\n")
    program.chmod(0o755)
    done = bash("bin/pipeline run job.yaml && bin/pipeline doctor", workplace.folder)
    assert "9 answered" in done.stdout, done.stderr
    assert "pipeline.py hides this package from python -m and from scripts beside it" in done.stdout
