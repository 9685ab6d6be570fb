"""Standard streams that are closed or full, or whose reader is gone: a run goes on, and ends as it would have."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


def make_streams_safe() -> None:
    """Open what was closed when this process started, and drop what cannot be written to stderr.

    The next file that is opened would take the number of a closed stream, and then get what is meant for the stream.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one
    sys.stdin = sys.stdin or io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = sys.stdout or io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
    stderr = io.BufferedWriter(io.FileIO(2, "w", closefd=False))
    sys.stderr = _LenientStream(stderr, errors="backslashreplace", line_buffering=True)


def print_if_possible(text: str) -> None:
    """Print a text, or drop it if stdout cannot be written: the exit code shall tell how the work has ended."""
    try:
        print(text, flush=True)
    except OSError:
        _drop_output(sys.stdout)


class _LenientStream(io.TextIOWrapper):
    """A text stream that drops what cannot be written."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            _drop_output(self)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            _drop_output(self)


def _drop_output(stream: TextIO) -> None:
    """Let a stream's descriptor lead nowhere, also for what the stream still holds and writes when Python exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
