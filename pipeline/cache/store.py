"""The store: the folder of segments on disk, addressed by content.

    <cache dir>/<first 2 hex>/<key>/segment.safetensors + segment.json
    <cache dir>/rejected/…          what could not be used, set aside
    <cache dir>/locks/…             held by who builds a segment, or writes
    <cache dir>/jobs/…              which contexts unfinished jobs need; see pins.py

Nothing found there is trusted: a segment that does not verify is set aside, the reason is logged, and the caller
builds it again. Several processes may share a folder: each segment is built once, writers take turns, readers never
wait. Knows keys and folders; what is in a segment is turboquant's.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from pipeline.cache.entries import REJECTED, Entry, entries, eviction_order, remove, size_of
from pipeline.cache.misses import MissLog
from pipeline.cache.pins import JOBS
from pipeline.errors import BudgetTooSmall, DiskFull, JobError, StoreError, is_disk_full, one_line
from pipeline.job.budget import budget_bytes, existing
from pipeline.job.job import Cache
from turboquant import CacheCodec
from turboquant.caches.segment import Segment
from turboquant.io.identity import Identity
from turboquant.io.plain_files import open_regular
from turboquant.io.segment_file import MANIFEST, SegmentError, read_segment, segment_bytes, write_segment

LOCKS = "locks"
SECONDS_BETWEEN_TRIES = 0.25  # for a lock that another process holds
_NAME = "name"
_FOLDER_BYTES = 8192  # for the small files beside the segments
_log = logging.getLogger(__name__)


def open_store(cache: Cache, is_needed: Callable[[str], bool]) -> Store:
    """The store that a job names; see Store."""
    return Store(cache.dir, None if cache.budget is None else budget_bytes(cache.budget, cache.dir), is_needed)


def _read(file: Path) -> str:
    with open_regular(file) as opened:
        return opened.read().decode()


class Store:
    """Segments of any models and codecs in one folder, which is made when it is first written to.

    budget: the most bytes that the folder may hold, all files counted, or None. is_needed: by label, which contexts
    must not be removed to keep within it.
    """

    def __init__(
        self, folder: Path, budget: int | None = None, is_needed: Callable[[str], bool] = lambda label: False
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise JobError(f"cache.dir: {folder} is a file; name a folder")
        self._folder, self._budget, self._is_needed = folder, budget, is_needed
        self._absences = MissLog(self.entries)
        self._held: set[str] = set()  # keys that the caller is at work with

    def load(
        self, key: str, start: int, codec: CacheCodec, identity: Identity, label: str, whole: bool = True
    ) -> Segment | None:
        """The segment stored under ``key``, behind ``start`` tokens, verified, or None; why not is logged.

        label: its context's. whole: whether the context ends with it.
        """
        folder = self._path(key)
        try:
            segment = read_segment(folder, key, codec, start)
        except SegmentError as error:
            if not (folder / MANIFEST).exists():
                self._absences.tell(key, identity, label, whole)
            else:
                self.reject(key, str(error))
            return None
        with suppress(OSError):  # a folder that only may be read
            os.utime(folder / MANIFEST)
        return segment

    def reject(self, key: str, reason: str) -> None:
        """Set a segment aside that cannot be used."""
        _log.warning("prefix %.12s rejected and built again: %s", key, reason)
        rejected, number = self._folder / REJECTED, 0
        try:
            rejected.mkdir(exist_ok=True)
            while (target := rejected / f"{key}-{number}").exists():
                number += 1
            os.replace(self._path(key), target)
        except OSError as error:  # it stays, and is rejected or replaced the next time
            _log.warning("%s: a bad segment cannot be set aside: %s", self._path(key), one_line(error))

    def save(
        self, key: str, segment: Segment, identity: Identity, parent: str | None, about: Mapping[str, str | bool]
    ) -> int:
        """Store a segment durably; returns its bytes on disk.

        about: its context's ``label``, and whatever else is to be told of it. Raises DiskFull, BudgetTooSmall, or
        StoreError where the folder refuses otherwise.
        """
        folder, needed = self._path(key), 0
        try:
            needed = segment_bytes(segment) + len(str(about)) + size_of(folder)
            with self.changing():
                self._make_room(needed)
                if folder.is_symlink():  # nothing is written or cleared away elsewhere
                    folder.unlink()
                if folder.exists():
                    for leftover in folder.glob(".*"):  # of a run that was killed while it wrote
                        leftover.unlink()
                return write_segment(folder, key, segment, identity, parent, about)
        except OSError as error:
            if is_disk_full(error):
                raise self._disk_full() from error
            raise StoreError(f"{folder}: a prefix cannot be stored: {one_line(error)}") from error
        except (RuntimeError, TypeError) as error:
            # MLX raises RuntimeError for what goes wrong with a file, turboquant TypeError for layers it cannot store.
            if self._free() < needed:
                raise self._disk_full() from error
            raise StoreError(f"{folder}: a prefix cannot be stored: {one_line(error)}") from error

    def make_room(self, needed: int) -> None:
        """Evict until ``needed`` more bytes fit. Raises DiskFull or BudgetTooSmall where they can't."""
        try:
            with self.changing():
                self._make_room(needed)
        except OSError as error:
            _log.debug("%s: no room can be made: %s", self._folder, error)

    @contextmanager
    def building(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """While the block runs, no other process builds the segment.

        waiting: called now and then while another builds it; what it raises ends the wait. The lock of a process that
        died is free. Where no lock can be had, there is none.
        """
        lock = self._lock(key[:2])  # few files, whose number is bounded; seldom does one wait for nothing
        waited = False
        try:
            while lock is not None and not lock.is_locked:
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    if not waited:
                        _log.info("prefix %.12s is being built by another run; waiting for it", key)
                    waited = True
                    waiting()
                    time.sleep(SECONDS_BETWEEN_TRIES)
        except OSError as error:
            _log.debug("%s: no lock: %s", self._folder, error)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def hold(self, keys: Sequence[str]) -> None:
        """These segments are not removed until others are held."""
        self._held = set(keys)

    def drop(self, matches: Callable[[Entry], bool]) -> None:
        """Remove the segments that match, which the caller is done with, but for what is needed."""
        try:
            with self.changing():
                for entry in eviction_order(self.entries(), lambda one: not matches(one) or self._is_needed(one.label)):
                    if entry.problem is None:
                        remove(entry)
        except OSError as error:
            _log.warning("%s: a prefix cannot be removed: %s", self._folder, one_line(error))

    def remove(self, found: Sequence[Entry]) -> None:
        """Remove what was found in the folder. Raises StoreError where it refuses."""
        try:
            for entry in found:
                remove(entry)
        except OSError as error:
            raise StoreError(f"{self._folder}: cannot be shrunk: {one_line(error)}") from error

    def contains(self, key: str) -> bool:
        """Whether a complete segment seems to be there; it is verified only when loaded."""
        return (self._path(key) / MANIFEST).is_file()

    def entries(self) -> Iterator[Entry]:
        """What is in the folder."""
        return entries(self._folder)

    def contexts(self, identity: Identity) -> Iterator[tuple[str, int]]:
        """Label and tokens of every context stored under an identity, as its manifest says; none is loaded."""
        wanted = asdict(identity)
        for entry in self.entries():
            manifest = entry.manifest
            if manifest and entry.label and entry.about.get("whole") and manifest["identity"] == wanted:
                start, tokens = manifest.get("start"), manifest.get("tokens")
                if type(start) is int and type(tokens) is int and tokens > 0:
                    yield entry.label, start + tokens

    def name(self) -> str:
        """Tells this folder from any other, on whatever machine that is; empty where it cannot be written."""
        file = self._folder / LOCKS / _NAME
        try:
            with self.changing():
                if not file.exists() or not (name := _read(file)):
                    file.write_text(name := uuid4().hex)
                return name
        except OSError as error:
            _log.debug("%s: has no name: %s", self._folder, error)
            return ""

    def used_bytes(self) -> int:
        """The size of every file in the folder."""
        return size_of(self._folder)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    def _lock(self, name: str) -> FileLock | None:
        folder = self._folder / LOCKS
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _log.debug("%s: no locks: %s", folder, error)
            return None
        return FileLock(folder / f"{name}.lock", thread_local=False)  # a segment is stored by another thread

    @contextmanager
    def changing(self) -> Iterator[None]:
        """One process at a time changes what is in the folder."""
        lock = self._lock("write")
        if lock is None:
            yield
            return
        with lock:
            yield

    def _make_room(self, needed: int) -> None:
        over = -1 if self._budget is None else self.used_bytes() + needed + self._reserve() - self._budget
        short = needed - self._free()
        if over > 0 or short > 0:
            for entry in self._evictable():
                if over <= 0 and short <= 0:
                    break
                _log.info("prefix %.12s evicted: %s", entry.key, entry.problem or "not used for longest")
                remove(entry)
                over, short = over - entry.bytes, short - entry.bytes
        if short > 0:
            raise self._disk_full(needed)
        if over > 0:
            raise BudgetTooSmall(
                f"cache.budget: {self._folder} may hold {self._budget:,} bytes, and what unfinished jobs need leaves "
                f"no room for a prefix of about {needed:,}; raise it"
            )

    def _reserve(self) -> int:
        """For the small files beside the segments; those that tell what jobs need are written anew beside the old."""
        return _FOLDER_BYTES + size_of(self._folder / JOBS)

    def _evictable(self) -> list[Entry]:
        if self._budget is None:
            return []  # without a budget nothing is removed unasked
        return eviction_order(self.entries(), lambda entry: entry.key in self._held or self._is_needed(entry.label))

    def _free(self) -> int:
        return shutil.disk_usage(existing(self._folder)).free

    def _disk_full(self, needed: int = 0) -> DiskFull:
        wanted = f", and a prefix of about {needed:,} is to be stored" if needed else ""
        return DiskFull(
            f"cache.dir: the disk of {self._folder} is full: {self._free():,} bytes are free{wanted}; "
            "free some or set another cache.dir: what is done is kept, and the same command resumes"
        )
