"""Runs commands for tests: in this process, or on a terminal."""

from __future__ import annotations

import fcntl
import importlib
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import typer.testing
from typer.main import get_command
from typer.testing import CliRunner, Result

from pipeline.cli import app
from tests import ROOT, warm

PROGRAM = f"{sys.executable} -m pipeline.cli"  # how these tests start the command in a process of its own


typer.testing._get_command = cache(get_command)  # type: ignore[attr-defined]  # or every call builds all commands anew


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@contextmanager
def hub_settings(**environment: str) -> Iterator[None]:
    """In the block, huggingface_hub has settings that it reads from the environment, but only when it is imported."""
    from huggingface_hub import constants

    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            importlib.reload(constants)
            yield
    finally:
        importlib.reload(constants)


def error_of(result: Result) -> str:
    """Return the one line on stderr of a command that refused its input."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def in_terminal(width: int, *arguments: str | Path, typed: str = "", code: int = 0, **environment: str) -> list[str]:
    """Return the lines that a command shows on a terminal of ``width`` columns. typed: input of the user."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    cleared = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "CI")}
    process = warm.Popen(
        [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.STDOUT,
        env=cleared | {"PYTHONPATH": str(ROOT), "TERM": "xterm"} | environment,
    )
    os.close(slave)
    os.write(master, typed.encode())
    shown = b""
    with os.fdopen(master, "rb", buffering=0) as screen:
        while True:
            try:
                shown += screen.read(4096)
            except OSError:  # as Linux says that nobody writes any more
                break
    assert process.wait() == code, shown
    return shown.decode().splitlines()
