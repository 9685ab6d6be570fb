"""The store: the folder of segments on disk, addressed by content.

    <cache dir>/<first 2 hex>/<key>/segment.safetensors + segment.json
    <cache dir>/rejected/…          segments that could not be used
    <cache dir>/locks/…             lock files of processes that build or store segments
    <cache dir>/jobs/…              contexts that unfinished jobs need; see pins.py

No file in the folder is trusted. A segment that fails verification is moved to rejected/, the reason is logged, and
the caller builds the segment again. Several processes may share a folder: each segment is built once, writers take
turns, readers never wait.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from filelock import FileLock, Timeout

from pipeline.cache.entries import REJECTED, Entry, eviction_order, list_entries, remove_entry, size_of
from pipeline.cache.pins import JOBS
from pipeline.errors import BudgetTooSmall, DiskFull, JobError, StoreError, is_disk_full, one_line
from pipeline.job.budget import budget_bytes, existing
from pipeline.job.job import Cache
from turboquant import CacheCodec
from turboquant.caches.prefix import Segment
from turboquant.io.atomic import open_regular
from turboquant.io.identity import Identity
from turboquant.io.segment_file import MANIFEST, SegmentError, read_segment, segment_bytes, write_segment

LOCKS = "locks"
SECONDS_BETWEEN_TRIES = 0.25  # to get a lock that another process holds
_FOLDER_ID = "name"
_RESERVED_BYTES = 8192  # for the small files beside the segments
_ABSENT = "absent"
_log = logging.getLogger(__name__)
_Read = TypeVar("_Read")


def open_store(cache: Cache, is_needed: Callable[[str], bool]) -> Store:
    """Open the store that a job names. is_needed: see `Store`."""
    return Store(cache.dir, None if cache.budget is None else budget_bytes(cache.budget, cache.dir), is_needed)


class Store:
    """Segments of any models and codecs in one folder. The folder is made when a segment is first stored.

    budget: the most bytes that all files of the folder may have together, or None. is_needed: returns whether the
    context of a label must not be evicted. Raises JobError if the folder is a file.
    """

    def __init__(
        self, folder: Path, budget: int | None = None, is_needed: Callable[[str], bool] = lambda label: False
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise JobError(f"cache.dir: {folder} is a file; name a folder")
        self._folder, self._budget, self._is_needed = folder, budget, is_needed
        self._miss_log = _MissLog(self.entries)
        self._protected: set[str] = set()  # keys of the segments that the caller uses now

    def load(
        self, key: str, start: int, codec: CacheCodec, identity: Identity, label: str, whole: bool = True
    ) -> Segment | None:
        """Read and verify the segment stored under ``key``. Return None, and log the reason, if there is none.

        start: number of context tokens before the segment. label: the label of its context. whole: whether the context
        ends with this segment.
        """
        folder = self._path(key)

        def read() -> Segment:
            return read_segment(folder, key, codec, start)

        segment: Segment | None = None
        try:
            segment = read()
        except SegmentError:
            if self.contains(key):
                with suppress(SegmentError):
                    segment = self.read_again(key, read)
            else:
                self._miss_log.log_miss(key, identity, label, whole)
        except (OSError, RuntimeError, MemoryError) as error:
            _log.warning("%s: a stored prefix cannot be read now, so it is built: %s", folder, one_line(error))
        if segment is not None:
            with suppress(OSError):  # the folder may be read-only
                os.utime(folder / MANIFEST)
        return segment

    def read_again(self, key: str, read: Callable[[], _Read]) -> _Read | None:
        """Read a bad segment again while no other process writes. Return None if it is gone.

        It may have looked bad because another process was writing it. If it is still bad, it is set aside, and the
        SegmentError is raised.
        """
        with self.write_lock():
            if not self._path(key).exists():
                return None
            try:
                return read()
            except SegmentError as error:
                self.reject(key, str(error))
                raise

    def reject(self, key: str, reason: str) -> None:
        """Move a segment that cannot be used to the folder of rejected segments."""
        _log.warning("prefix %.12s rejected and built again: %s", key, reason)
        rejected, number = self._folder / REJECTED, 0
        try:
            rejected.mkdir(exist_ok=True)
            while (target := rejected / f"{key}-{number}").exists():
                number += 1
            os.replace(self._path(key), target)
        except OSError as error:  # the segment stays, and is rejected or replaced the next time
            _log.warning("%s: a bad segment cannot be set aside: %s", self._path(key), one_line(error))

    def save(
        self, key: str, segment: Segment, identity: Identity, parent: str | None, metadata: Mapping[str, str | bool]
    ) -> int:
        """Store a segment durably and return its bytes on disk.

        parent: the key of the segment before it, or None. metadata: the ``label`` of its context, and other facts
        about its origin. Raises DiskFull, BudgetTooSmall, or StoreError for any other failure of the folder.
        """
        folder, needed = self._path(key), 0
        try:
            needed = segment_bytes(segment) + len(str(metadata)) + size_of(folder)
            with self.write_lock():
                self._make_room(needed)
                if folder.is_symlink():  # no file outside the store is written or removed
                    folder.unlink()
                if folder.exists():
                    for leftover in folder.glob(".*"):  # by a run that was killed while it wrote
                        leftover.unlink()
                return write_segment(folder, key, segment, identity, parent, metadata)
        except OSError as error:
            if is_disk_full(error):
                raise self._disk_full() from error
            raise StoreError(f"{folder}: a prefix cannot be stored: {one_line(error)}") from error
        except (RuntimeError, TypeError) as error:
            # MLX raises RuntimeError for errors of files; turboquant raises TypeError for layers that it cannot store.
            if self._free() < needed:
                raise self._disk_full() from error
            raise StoreError(f"{folder}: a prefix cannot be stored: {one_line(error)}") from error

    def make_room(self, needed: int) -> None:
        """Evict segments until ``needed`` more bytes fit. Raises DiskFull or BudgetTooSmall if they cannot fit."""
        try:
            with self.write_lock():
                self._make_room(needed)
        except OSError as error:
            _log.debug("%s: no room can be made: %s", self._folder, error)

    @contextmanager
    def build_lock(self, key: str, while_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold a lock so that no other process builds the segment while the block runs.

        while_waiting: called repeatedly while another process has the lock; an exception that it raises ends the wait.
        The lock of a process that died is free. If the folder allows no lock files, the block runs without a lock.
        """
        lock = self._lock(key[:2])  # one lock for many keys bounds the number of files; a needless wait is rare
        waited = False
        try:
            while lock is not None and not lock.is_locked:
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    if not waited:
                        _log.info("prefix %.12s is being built by another run; waiting for it", key)
                    waited = True
                    while_waiting()
                    time.sleep(SECONDS_BETWEEN_TRIES)
        except OSError as error:
            _log.debug("%s: no lock: %s", self._folder, error)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def protect(self, keys: Sequence[str]) -> None:
        """Protect these segments from eviction, in place of those that were protected before."""
        self._protected = set(keys)

    def remove_where(self, matches: Callable[[Entry], bool]) -> None:
        """Remove the segments that match and that no job needs."""
        try:
            with self.write_lock():
                for entry in eviction_order(self.entries(), lambda one: not matches(one) or self._is_needed(one.label)):
                    if entry.problem is None:
                        remove_entry(entry)
        except OSError as error:
            _log.warning("%s: a prefix cannot be removed: %s", self._folder, one_line(error))

    def remove(self, entries: Sequence[Entry]) -> None:
        """Remove entries. Raises StoreError if one cannot be removed."""
        try:
            for entry in entries:
                remove_entry(entry)
        except OSError as error:
            raise StoreError(f"{self._folder}: cannot be shrunk: {one_line(error)}") from error

    def contains(self, key: str) -> bool:
        """Return whether a segment has a manifest. The segment is verified only when it is loaded."""
        return (self._path(key) / MANIFEST).is_file()

    def entries(self) -> Iterator[Entry]:
        """Yield an entry for each segment in the folder, usable or not."""
        return list_entries(self._folder)

    def contexts(self, identity: Identity) -> Iterator[tuple[str, int]]:
        """Yield the label and the number of tokens of each context of an identity, as the manifests state them."""
        wanted = asdict(identity)
        for entry in self.entries():
            manifest = entry.manifest
            if manifest and entry.label and entry.metadata.get("whole") and manifest["identity"] == wanted:
                start, tokens = manifest.get("start"), manifest.get("tokens")
                if type(start) is int and type(tokens) is int and tokens > 0:
                    yield entry.label, start + tokens

    def folder_id(self) -> str:
        """Return an id of this folder that is the same on all machines; "" if no id can be written to the folder."""
        file, folder_id = self._folder / LOCKS / _FOLDER_ID, ""
        try:
            with self.write_lock():
                if file.exists():
                    with open_regular(file) as opened:
                        folder_id = opened.read().decode()
                if not folder_id:
                    folder_id = uuid4().hex
                    file.write_text(folder_id)
                return folder_id
        except OSError as error:
            _log.debug("%s: has no id: %s", self._folder, error)
            return ""

    def used_bytes(self) -> int:
        """Return the bytes of all files in the folder."""
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
        return FileLock(folder / f"{name}.lock", thread_local=False)  # another thread stores segments

    @contextmanager
    def write_lock(self) -> Iterator[None]:
        """Hold the lock that a process needs to change the folder."""
        lock = self._lock("write")
        if lock is None:
            yield
            return
        with lock:
            yield

    def _make_room(self, needed: int) -> None:
        over = -1
        if self._budget is not None:
            # A job's file of pins is written anew beside the old one, so its size counts twice.
            reserved = _RESERVED_BYTES + size_of(self._folder / JOBS)
            over = self.used_bytes() + needed + reserved - self._budget
        short = needed - self._free()
        if over > 0 or short > 0:
            entries: list[Entry] = []
            if self._budget is not None:  # without a budget, only the user removes segments
                entries = eviction_order(
                    self.entries(), lambda entry: entry.key in self._protected or self._is_needed(entry.label)
                )
            for entry in entries:
                if over <= 0 and short <= 0:
                    break
                _log.info("prefix %.12s evicted: %s", entry.key, entry.problem or "the least recently used")
                remove_entry(entry)
                over, short = over - entry.bytes, short - entry.bytes
        if short > 0:
            raise self._disk_full(needed)
        if over > 0:
            raise BudgetTooSmall(
                f"cache.budget: {self._folder} may hold {self._budget:,} bytes, and what unfinished jobs need leaves "
                f"no room for a prefix of about {needed:,}; raise it"
            )

    def _free(self) -> int:
        return shutil.disk_usage(existing(self._folder)).free

    def _disk_full(self, needed: int = 0) -> DiskFull:
        wanted = f", and a prefix of about {needed:,} is to be stored" if needed else ""
        return DiskFull(
            f"cache.dir: the disk of {self._folder} is full: {self._free():,} bytes are free{wanted}; "
            "free some or set another cache.dir: what is done is kept, and the same command resumes"
        )


class _MissLog:
    """Logs why segments are not in the store, each reason once. entries: lists the store; called at the first miss."""

    def __init__(self, entries: Callable[[], Iterable[Entry]]) -> None:
        self._entries = entries
        self._identities: dict[str, list[Mapping[str, Any]]] | None = None  # of the stored contexts, by label
        self._logged_reasons: set[str] = set()

    def log_miss(self, key: str, identity: Identity, label: str, whole: bool) -> None:
        """Log why a segment is absent: at level INFO if it is a new reason, else at level DEBUG.

        label: the label of its context. whole: whether the context ends with this segment.
        """
        reason = self._explain(identity, label, whole)
        is_new = reason != _ABSENT and reason not in self._logged_reasons
        _log.log(logging.INFO if is_new else logging.DEBUG, "prefix %.12s not in the store: %s", key, reason)
        self._logged_reasons.add(reason)

    def _explain(self, identity: Identity, label: str, whole: bool) -> str:
        """Return the first difference between the identity and that of a stored context of the same text."""
        if self._identities is None:
            self._identities = {}
            for entry in self._entries():
                if entry.manifest is not None and entry.metadata.get("whole"):
                    self._identities.setdefault(entry.label, []).append(entry.manifest["identity"])
        wanted = asdict(identity)
        for stored in self._identities.get(label, []):
            for name, value in wanted.items():
                if stored.get(name) != value:
                    reasons = {"weights": "other weights", "tokenizer": "another tokenizer or chat template"}
                    return reasons.get(name, f"{name} was '{stored.get(name)}', now '{value}'")
        if whole and label in self._identities:
            return "the context of this text ends elsewhere: the queries have changed"
        return _ABSENT
