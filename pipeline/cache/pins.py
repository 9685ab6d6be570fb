"""Which contexts jobs that are not finished still need, so that no run evicts them.

    <cache dir>/jobs/<digest of the job's output>.json    while that job is unfinished

Written when a run begins to compute and now and then after, removed when its job is finished. The file of a job that
nobody went on with for a week counts no more. Knows labels of contexts; nothing of segments or rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.errors import BudgetTooSmall, OutputError
from pipeline.files.atomic import atomic_file
from turboquant.io.plain_files import open_regular

JOBS = "jobs"
SECONDS_BETWEEN_WRITES = 60.0
SECONDS_UNTIL_FORGOTTEN = 7 * 24 * 3600
_DIGITS = 16  # of a label: enough to tell contexts apart
_log = logging.getLogger(__name__)


def output_digest(output: Path) -> str:
    """Names a job by where its result goes."""
    return hashlib.sha256(str(output).encode()).hexdigest()[:_DIGITS]


class Pins:
    """The contexts that one job, and the others that share its store, still need.

    output: where the job's result goes; None for nobody's, to look at what jobs need.
    """

    def __init__(self, folder: Path, output: Path | None = None) -> None:
        self._folder, self._output = folder / JOBS, output
        self._file = self._folder / f"{output_digest(output)}.json" if output else None
        self._own: Counter[int] = Counter()
        self._written = 0.0
        self._others: tuple[list[tuple[Path, int]], set[int]] = ([], set())

    def start(self, labels: Iterable[str], make_room: Callable[[int], None] = lambda _: None) -> None:
        """The job needs the contexts of these labels, one as often as it is given.

        make_room: called with the bytes that telling others of it takes; what it raises stops that.
        """
        self._own.update(map(_number, labels))
        try:
            make_room(self.nbytes)
        except BudgetTooSmall as error:
            _log.debug("other jobs are not told what this one needs: %s", error)
        else:
            self._write()

    def done(self, label: str) -> None:
        """A document of this label needs its context no more."""
        number = _number(label)
        self._own[number] -= 1
        if self._own[number] <= 0:
            del self._own[number]
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self._write()

    def finish(self) -> None:
        """The run is over; what is still needed stays so until the job is gone on with."""
        if self._own:
            self._write()
            return
        with suppress(OSError):
            if self._file is not None:
                self._file.unlink(missing_ok=True)

    def wants(self, label: str) -> bool:
        """Whether a context of this label is needed, by this job or another."""
        number = _number(label)
        return number in self._own or number in self._needed_by_others()

    @property
    def nbytes(self) -> int:
        """About the size of the job's file."""
        return 200 + len(str(self._output)) + (_DIGITS + 4) * len(self._own)

    def _write(self) -> None:
        if self._file is None:
            return
        self._written = time.monotonic()
        labels = [f"{number:0{_DIGITS}x}" for number in self._own]
        try:
            with atomic_file(self._file) as path:
                path.write_text(json.dumps({"output": str(self._output), "labels": labels}), encoding="utf-8")
        except OutputError as error:
            _log.debug("other jobs are not told what this one needs: %s", error)

    def _needed_by_others(self) -> set[int]:
        """Read again only when a file has changed."""
        files: list[tuple[Path, int]] = []
        with suppress(OSError):
            for file in sorted(self._folder.glob("*.json")):
                state = file.stat()
                if file != self._file and time.time() - state.st_mtime < SECONDS_UNTIL_FORGOTTEN:
                    files.append((file, state.st_mtime_ns))
        if files != self._others[0]:
            self._others = files, set().union(*(_labels(file) for file, _ in files))
        return self._others[1]


def _labels(file: Path) -> set[int]:
    try:
        with open_regular(file) as opened:
            return {int(label, 16) for label in json.loads(opened.read())["labels"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _number(label: str) -> int:
    return int(hashlib.sha256(label.encode()).hexdigest()[:_DIGITS], 16)
