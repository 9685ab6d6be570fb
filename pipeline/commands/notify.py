"""``--notify``: a command of the user's that is run when a run ends, in whatever way."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from pipeline.commands.console import INTERRUPTED
from pipeline.errors import JobError, PipelineError, one_line
from pipeline.job.job import Job
from pipeline.logs import tell

SECONDS = 60.0  # that the command may take
EXIT_CODE = "PIPELINE_EXIT_CODE"  # the environment variable that has the run's exit code


@contextmanager
def notifying(command: str | None, job: Job) -> Iterator[None]:
    """Run a command when the block ends in any way, with the path of the job's run file as its last argument.

    command: as a shell reads it; no shell runs it. Its output goes to stderr, and if it fails, a line says so: the run
    ends as it would have ended. Raises JobError if there is no such command.
    """
    if command is None:
        yield
        return
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise JobError(f"--notify {command}: {one_line(error)}") from None
    if not words or shutil.which(words[0]) is None:
        raise JobError(f"--notify {command}: there is no such command; try it by itself first")
    code = 1
    try:
        yield
        code = 0
    except PipelineError as error:
        code = error.exit_code
        raise
    except typer.Exit as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = INTERRUPTED
        raise
    finally:
        _notify([*words, f"{job.result_url or job.result_file}.run.json"], command, code)


def _notify(words: list[str], command: str, exit_code: int) -> None:
    environment = os.environ | {EXIT_CODE: str(exit_code)}
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=sys.__stderr__, env=environment, timeout=SECONDS, check=False
        )
        problem = f"it ended with exit status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"it took longer than {SECONDS:g} s and was killed"
    except OSError as error:
        problem = one_line(error)
    if problem:
        tell(f"--notify {command}: {problem}")
