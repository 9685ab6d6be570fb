"""What a process does to a folder, step by step, and what a SIGKILL at each of its steps would leave.

A step is something done to the folder after which its files differ. Knows files and reports; the product does not know
that it is watched.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.utime",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
)
_watchers: list[tuple[str, Callable[[str, str], None]]] = []
_is_hooked = False


@contextmanager
def watching(folder: Path, tell: Callable[[str, str], None]) -> Iterator[None]:
    """``tell`` is called with what is about to be done to which file under the folder, as long as the block runs.

    Before whatever opens for writing, renames, removes or makes, and before every fsync, when all is written.
    """
    global _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hook)  # cannot be taken away again
        _is_hooked = True
    real = os.fsync

    def fsync(descriptor: int) -> None:
        _tell("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    _watchers.append((str(folder), tell))
    os.fsync = fsync
    try:
        yield
    finally:
        os.fsync = real
        _watchers.pop()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers or event not in EVENTS or (event == "open" and not arguments[2] & WRITES):
        return
    path = arguments[0]
    beside = arguments[{"os.rename": 2, "os.mkdir": 2}.get(event, -1)]
    if event in ("os.remove", "os.rmdir", "os.rename", "os.mkdir") and isinstance(beside, int) and beside >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{beside}"), os.fsdecode(path))
    _tell(event, path)


def _tell(event: str, path: Any) -> None:
    if isinstance(path, str | bytes | os.PathLike):
        for folder, tell in _watchers:
            if f"{os.fsdecode(path)}/".startswith(f"{folder}/"):
                tell(event, os.fsdecode(path))


def state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Every file's and folder's name, size and time of change. Not by pathlib, since it is done at each event."""
    found, folders = [], [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    found.append((entry.path, 0, 0))
                else:
                    state = entry.stat(follow_symlinks=False)
                    found.append((entry.path, state.st_size, state.st_mtime_ns))
    return sorted(found)


@dataclass
class Step:
    """What a process is about to do, and what a SIGKILL would leave: a copy of the files."""

    name: str
    files: Path
    noted: int


class Steps:
    """Copies a folder before every n-th step. `note` gives a number that is kept with each copy.

    SIGKILL leaves the files as they are. What was written last may be cut in half, so where a file is about to be made
    durable there are two steps: amid the writing of it, and behind.
    """

    def __init__(self, folder: Path, copies: Path, every: int, note: Callable[[], int]) -> None:
        self.copied: list[Step] = []
        self.count = 0
        self._folder, self._copies, self._every, self._note = folder, copies, every, note
        self._state: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()  # the others wait while one copies

    def tell(self, event: str, path: str) -> None:
        """A step, if the files have changed since the last."""
        with self._lock:
            if (state := state_of(self._folder)) == self._state:
                return
            self._state = state
            name = f"{event} {Path(path).name}"
            if event == "fsync" and os.path.isfile(path) and (step := self._step(f"amid {name}")):
                half = step.files / Path(path).relative_to(self._folder)
                os.truncate(half, half.stat().st_size // 2)
            self._step(name)

    def _step(self, name: str) -> Step | None:
        self.count += 1
        if (self.count - 1) % self._every:
            return None
        self.copied.append(Step(name, self._copies / str(self.count), self._note()))
        copy_at_one_moment(self._folder, self.copied[-1].files)
        return self.copied[-1]


def copy_at_one_moment(folder: Path, copy: Path) -> None:
    """Copy a folder, once more where another thread has changed it meanwhile."""
    while True:
        before = state_of(folder)
        with suppress(shutil.Error):
            shutil.copytree(folder, copy)
            if state_of(folder) == before:
                return
        shutil.rmtree(copy)


def files_hold(place: Any) -> int:
    """Read everything that is called complete, as whoever trusts names would; returns the rows committed.

    Raises where a file is not what its name says.
    """
    import pyarrow.parquet as pq

    from pipeline.cache.codec import job_codec
    from pipeline.job.job_file import load_job
    from turboquant.io.segment_file import read_manifest, read_segment

    codec = job_codec(load_job(place.job_file).cache)
    for folder in place.segments():
        read_segment(folder, folder.name, codec, read_manifest(folder).start)
    for file in place.cache.glob("jobs/[!.]*"):
        json.loads(file.read_bytes())
    folder = Path(f"{place.output}.parts")
    parts = [pq.read_table(file) for file in folder.glob("*/[!.]*.parquet")]
    assert all(part.num_rows == len(place.queries) for part in parts)
    if place.output.exists():
        return int(pq.read_table(place.output).num_rows)
    group = [pq.read_table(file) for file in folder.glob(".group")]
    return len({row["document_id"] for part in [*parts, *group] for row in part.to_pylist()}) * len(place.queries)
