"""Pins: the contexts that unfinished jobs still need, so that no run evicts them.

    <cache dir>/jobs/<digest of the job's output>.json    exists while that job is unfinished

A job's file is written when the job's run begins to compute, and updated at intervals. It is removed when the job is
finished. A file that was not updated for a week is ignored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter

from pipeline.errors import BudgetTooSmall
from turboquant.io.atomic import TEMPORARY, open_folder
from turboquant.io.json_file import read_json

JOBS = "jobs"
SECONDS_BETWEEN_WRITES = 60.0
SECONDS_UNTIL_FORGOTTEN = 7 * 24 * 3600
_DIGITS = 16  # hexadecimal digits of a label's digest; enough to distinguish contexts
_log = logging.getLogger(__name__)


def output_digest(output: Path) -> str:
    """Return a short name for a job, made from the path of its result."""
    return hashlib.sha256(str(output).encode()).hexdigest()[:_DIGITS]


@dataclass(frozen=True)
class _PinsFile:
    """The content of a job's file: the path of its result, and the digests of the labels that it needs."""

    output: str
    labels: list[Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]]


_SCHEMA = TypeAdapter(_PinsFile)


class Pins:
    """The contexts that a job and the other jobs of the same store still need.

    folder: the store's folder. output: path of the job's result; None to read the pins of all jobs and write none.
    """

    def __init__(self, folder: Path, output: Path | None = None) -> None:
        self._folder, self._output = folder / JOBS, output
        self._file = self._folder / f"{output_digest(output)}.json" if output else None
        self._own: Counter[int] = Counter()
        self._written = 0.0
        self._others: tuple[list[tuple[Path, int]], set[int]] = ([], set())

    def keep_earlier(self) -> None:
        """Keep the pins of the job's earlier runs too, because this run is of a part of the job."""
        if self._file is not None:
            self._own.update(_labels(self._file))

    def pin(self, labels: Iterable[str], make_room: Callable[[int], None] = lambda _: None) -> None:
        """Pin the contexts of these labels for the job. A label that is given twice is pinned twice.

        make_room: called with the approximate bytes of the job's file; if it raises BudgetTooSmall, no file is written
        and other jobs do not see the pins.
        """
        self._own |= Counter(map(_number, labels))
        file_bytes = 200 + len(str(self._output)) + (_DIGITS + 4) * len(self._own)
        try:
            make_room(file_bytes)
        except BudgetTooSmall as error:
            _log.debug("other jobs cannot see the pins of this job: %s", error)
        else:
            self._write()

    def unpin(self, label: str) -> None:
        """Take back one pin of a label, since a document with that label is finished."""
        number = _number(label)
        self._own[number] -= 1
        if self._own[number] <= 0:
            del self._own[number]
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self._write()

    def close(self) -> None:
        """End the run. Pins that are left stay in the job's file; without any, the file is removed."""
        if self._own:
            self._write()
            return
        with suppress(OSError):
            if self._file is not None:
                self._file.unlink(missing_ok=True)

    def is_pinned(self, label: str) -> bool:
        """Return whether this job or another one has pinned a context of this label."""
        number = _number(label)
        return number in self._own or number in self._pins_of_others()

    def _write(self) -> None:
        if self._file is None:
            return
        self._written = time.monotonic()
        labels = [f"{number:0{_DIGITS}x}" for number in self._own]
        try:
            with open_folder(self._folder, self._folder.parent, make=True) as folder:
                for leftover in os.listdir(folder.descriptor):  # of a run of this job that was killed while it wrote
                    if leftover.startswith(f"{TEMPORARY}{self._file.name}."):
                        folder.remove(leftover)
                with folder.replacing(self._file.name) as file:
                    file.write(json.dumps({"output": str(self._output), "labels": labels}).encode())
        except OSError as error:
            _log.debug("other jobs cannot see the pins of this job: %s", error)

    def _pins_of_others(self) -> set[int]:
        """Return the pins in the files of other jobs. The files are read again only if one has changed."""
        files: list[tuple[Path, int]] = []
        with suppress(OSError):
            for file in sorted(self._folder.glob("*.json")):
                state = file.lstat()
                if file != self._file and time.time() - state.st_mtime < SECONDS_UNTIL_FORGOTTEN:
                    files.append((file, state.st_mtime_ns))
        if files != self._others[0]:
            self._others = files, set().union(*(_labels(file) for file, _ in files))
        return self._others[1]


def _labels(file: Path) -> set[int]:
    try:
        with open_folder(file.parent, file.parent.parent) as folder, folder.open(file.name) as opened:
            return {int(label, 16) for label in read_json(opened, _SCHEMA).labels}
    except (OSError, ValueError):
        return set()


def _number(label: str) -> int:
    return int(hashlib.sha256(label.encode()).hexdigest()[:_DIGITS], 16)
