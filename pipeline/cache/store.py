"""The store: the folder of segments on disk, addressed by content.

    <cache dir>/<first 2 hex>/<key>/segment.safetensors + segment.json
    <cache dir>/rejected/…          segments that could not be used
    <cache dir>/locks/…             lock files of processes that build or store segments
    <cache dir>/jobs/…              contexts that unfinished jobs need; see pins.py
    <cache dir>/index.sqlite        the entries, so that they are found without reading the folder; see index.py

No file in the folder is trusted, and no link in it is followed. A segment that fails verification is moved to
rejected/, the reason is logged, and the caller builds the segment again. Several processes may share a folder: each
segment is built once, writers take turns, readers never wait.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from pipeline.cache.entries import REJECTED, Entry, is_bucket, remove_entry, size_of
from pipeline.cache.index import DAMAGED, INDEX, Index, IndexMode
from pipeline.cache.locks import LOCKS, Lock
from pipeline.cache.pins import JOBS
from pipeline.errors import BudgetTooSmall, DiskFull, JobError, StoreError, is_disk_full, one_line
from pipeline.job.budget import budget_bytes, existing
from pipeline.job.job import Cache
from turboquant import CacheCodec
from turboquant.caches.prefix import Segment
from turboquant.io.atomic import open_folder
from turboquant.io.identity import Identity
from turboquant.io.segment_file import MANIFEST, SegmentError, read_segment, segment_bytes, write_segment

SECONDS_BETWEEN_TRIES = 0.25  # to get a lock that another process holds
_FOLDER_ID = "name"
_RESERVED_BYTES = 8192  # for the small files beside the segments
_MOST_SECONDS_BETWEEN = 60.0
_ABSENT = "absent"
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def open_store(cache: Cache, is_needed: Callable[[str], bool]) -> Store:
    """Open the store that a job names. is_needed: see `Store`."""
    return Store(cache.dir, None if cache.budget is None else budget_bytes(cache.budget, cache.dir), is_needed)


class Store:
    """Segments of any models and codecs in one folder. The folder is made when a segment is first stored.

    budget: the most bytes that all files of the folder may have together, or None. is_needed: returns whether the
    context of a label must not be evicted. read_only: write nothing to the folder, no index and no locks.

    Raises JobError if the folder is a file, or holds a link in the place of one of its folders.
    """

    def __init__(
        self,
        folder: Path,
        budget: int | None = None,
        is_needed: Callable[[str], bool] = lambda label: False,
        read_only: bool = False,
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise JobError(f"cache.dir: {folder} is a file; name a folder")
        for name in (LOCKS, JOBS, REJECTED):
            if (folder / name).is_symlink():
                raise JobError(f"cache.dir: {folder / name} is a link, and a store may hold none; remove it")
        self._folder, self._budget, self._is_needed, self._read_only = folder, budget, is_needed, read_only
        self._index: Index | None = None  # one in memory
        self._sync_times, self._measuring_times = _Times(), _Times()
        self._other_files = 0  # bytes when they were last measured
        self._index_turn = threading.RLock()
        self._miss_log = _MissLog(self)
        self._protected: set[str] = set()  # keys of the segments that the caller uses now

    def load(
        self,
        key: str,
        start: int,
        codec: CacheCodec,
        identity: Identity,
        label: str,
        whole: bool = True,
        most_bytes: int | None = None,
    ) -> Segment | None:
        """Read and verify the segment stored under ``key``. Return None, and log the reason, if there is none.

        start: number of context tokens before the segment. label: the label of its context. whole: whether the context
        ends with this segment. most_bytes: that it may have.
        """
        folder = self._path(key)

        def read() -> Segment:
            return read_segment(folder, key, codec, start, most_bytes, self._folder)

        segment: Segment | None = None
        try:
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
                os.utime(folder / MANIFEST, follow_symlinks=False)
        return segment

    def read_again(self, key: str, read: Callable[[], _Result]) -> _Result | None:
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
        number = 0
        try:
            with (
                open_folder(self._path(key).parent, self._folder) as source,
                open_folder(self._folder / REJECTED, self._folder, make=True) as target,
            ):
                while os.access(f"{key}-{number}", os.F_OK, dir_fd=target.descriptor, follow_symlinks=False):
                    number += 1
                os.replace(key, f"{key}-{number}", src_dir_fd=source.descriptor, dst_dir_fd=target.descriptor)
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
                with open_folder(folder.parent, self._folder, make=True) as bucket:
                    if folder.is_symlink():
                        bucket.remove(key)
                    with bucket.folder(key, make=True) as own:
                        for leftover in os.listdir(own.descriptor):
                            # By a run that was killed while it wrote, or a folder in the place of a file.
                            if leftover.startswith(".") or (folder / leftover).is_dir():
                                own.remove(leftover)
                size = write_segment(folder, key, segment, identity, parent, metadata, self._folder)
                if self._budget is not None:
                    self._indexed(lambda index: index.refresh([key]))
                return size
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
        is_waiting = False
        try:
            while lock is not None and not lock.acquire(wait=False):
                if not is_waiting:
                    _log.info("prefix %.12s is being built by another run; waiting for it", key)
                is_waiting = True
                while_waiting()
                time.sleep(SECONDS_BETWEEN_TRIES)
            yield
        finally:
            if lock is not None:
                lock.release()

    def protect(self, keys: Sequence[str]) -> None:
        """Protect these segments from eviction, in place of those that were protected before."""
        self._protected = set(keys)

    def remove_built(self, output: str, keys: Collection[str] | None = None) -> None:
        """Remove the segments that a job has built, or those of them with the given keys, if no job needs them.

        output: the digest of the job's output. A segment stays while the store has one that continues it.
        """

        def remove(index: Index) -> None:
            if keys is not None:
                index.refresh(keys)
            for entry in index.built_by(output) if keys is None else index.of_keys(keys):
                if entry.output == output and not self._is_needed(entry.label) and not index.has_children(entry):
                    remove_entry(self._folder, entry)
                    index.forget(entry)

        try:
            with self.write_lock():
                self._indexed(remove)
        except OSError as error:
            _log.warning("%s: a prefix cannot be removed: %s", self._folder, one_line(error))

    def clean(self, choose: Callable[[Entry, int], str | None], dry_run: bool) -> tuple[list[tuple[Entry, str]], int]:
        """Remove entries in the order of eviction as long as ``choose`` returns a reason; only look at them if dry_run.

        choose: called with an entry and the bytes that the store has now. Returns the entries that were removed with
        their reasons, and the number of all others. Raises StoreError if one cannot be removed.
        """

        def clean(index: Index) -> tuple[list[tuple[Entry, str]], int]:
            removed: list[tuple[Entry, str]] = []
            used = index.segment_bytes() + self._other_bytes()
            while (entry := index.next_to_evict(lambda one: self._is_needed(one.label), thorough=True)) is not None:
                reason = choose(entry, used)
                if reason is None:
                    break
                if not dry_run:
                    remove_entry(self._folder, entry)
                index.forget(entry)
                removed.append((entry, reason))
                used -= entry.bytes
            return removed, index.count()

        try:
            with self.write_lock():
                return self._indexed(clean, thorough=True)
        except OSError as error:
            raise StoreError(f"{self._folder}: cannot be shrunk: {one_line(error)}") from error

    def contains(self, key: str) -> bool:
        """Return whether a segment has a manifest. The segment is verified only when it is loaded."""
        return (self._path(key) / MANIFEST).is_file()

    def entries(self) -> list[Entry]:
        """Return an entry for each segment in the folder, usable or not. Raises StoreError if they cannot be read."""
        try:
            with self.write_lock():
                return self._indexed(lambda index: list(index.entries()), thorough=True)
        except OSError as error:
            raise StoreError(f"{self._folder}: cannot be read: {one_line(error)}") from error

    def contexts(self, identity: Identity) -> Iterator[tuple[str, int]]:
        """Yield the label and the number of tokens of each context of an identity, as the manifests state them."""
        for entry in self.ends_of_contexts(thorough=True):
            if entry.identity == identity:
                yield entry.label, entry.start + entry.tokens

    def ends_of_contexts(self, label: str | None = None, thorough: bool = False) -> Sequence[Entry]:
        """Return the last segment of each context: of all, or of those of one label; none if they cannot be read."""
        if not self._folder.exists():  # reading makes no folder
            return []
        try:
            with self.write_lock():
                return self._indexed(lambda index: list(index.contexts(label)), thorough)
        except (OSError, StoreError) as error:
            _log.debug("%s: cannot be read: %s", self._folder, error)
            return []

    def folder_id(self) -> str:
        """Return an id of this folder that is the same on all machines; "" if no id can be written to the folder."""
        try:
            with self.write_lock(), open_folder(self._folder / LOCKS, self._folder, make=True) as folder:
                with suppress(FileNotFoundError), folder.open(_FOLDER_ID) as file:
                    folder_id = file.read(33).decode("ascii", "replace")
                    if re.fullmatch("[0-9a-f]{32}", folder_id):
                        return folder_id
                with folder.replacing(_FOLDER_ID) as file:
                    file.write((folder_id := uuid4().hex).encode())
                return folder_id
        except OSError as error:
            _log.debug("%s: has no id: %s", self._folder, error)
            return ""

    def used_bytes(self) -> int:
        """Return the bytes of all files in the folder."""
        return size_of(self._folder)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    def _lock(self, name: str) -> Lock | None:
        """Return a lock; None if the folder allows no lock files, since the job goes on without locks then."""
        try:
            return None if self._read_only else Lock(self._folder, name)
        except OSError as error:
            _log.debug("%s: no locks: %s", self._folder, error)
            return None

    @contextmanager
    def write_lock(self) -> Iterator[None]:
        """Hold the lock that a process needs to change the folder."""
        lock = self._lock("write")
        try:
            if lock is not None:
                lock.acquire()
            yield
        finally:
            if lock is not None:
                lock.release()

    def _indexed(self, task: Callable[[Index], _Result], thorough: bool = False) -> _Result:
        """Do a task with the index. The caller holds the write lock.

        What others have changed in the folder may be unknown to the index for a moment, unless they told it. An index
        that is damaged is made again, and in memory if even that fails. Raises OSError, and StoreError if the index
        cannot be made at all. thorough: the index knows every change; see `Index.sync`.
        """
        with self._index_turn:
            modes: Sequence[IndexMode] = ("copy", "make") if self._read_only else ("keep", "keep", "make")
            if self._index is not None:
                modes = ("make", "make")
            for mode in modes:
                index = self._index
                try:
                    index = index or Index(self._folder, mode)
                    index.begin()
                    if thorough or index.is_new or self._sync_times.is_due:
                        with self._sync_times.taking():
                            index.sync(thorough)
                    try:
                        return task(index)
                    finally:
                        index.commit()
                        self._index = None if mode == "keep" else index
                except DAMAGED as error:
                    _log.info("%s: the index is made again: %s", self._folder, one_line(error))
                    self._index = None
                    if mode == "keep":
                        with suppress(OSError):
                            Index.discard(self._folder)
                finally:
                    if index is not None and index is not self._index:
                        index.close()  # a disk with an open file cannot be taken away
            raise StoreError(f"{self._folder}: cannot be indexed; another process changes it")

    def _other_bytes(self) -> int:
        """Return the bytes of all files that are no segments.

        Results that wait to be uploaded may be many files. So the files are measured again only now and then.
        """
        if self._measuring_times.is_due:
            with self._measuring_times.taking():
                paths: list[Path] = []
                with suppress(FileNotFoundError), os.scandir(self._folder) as items:
                    paths += [Path(item.path) for item in items if not is_bucket(item.name) and not item.is_symlink()]
                self._other_files = sum(map(size_of, paths))
        return self._other_files

    def _make_room(self, needed: int) -> None:
        if self._budget is not None:
            self._indexed(lambda index: self._evict(index, needed))
        elif needed > self._free():  # without a budget, only the user removes segments
            raise self._disk_full(needed)

    def _evict(self, index: Index, needed: int) -> None:
        # A job's file of pins is written anew beside the old one, and so are pages of the index.
        reserved = _RESERVED_BYTES + size_of(self._folder / JOBS) + size_of(self._folder / INDEX)
        assert self._budget is not None
        over = index.segment_bytes() + self._other_bytes() + needed + reserved - self._budget
        short = needed - self._free()
        while over > 0 or short > 0:
            entry = index.next_to_evict(lambda one: one.key in self._protected or self._is_needed(one.label))
            if entry is None:
                break
            _log.info("prefix %.12s evicted: %s", entry.key, entry.problem or "the least recently used")
            remove_entry(self._folder, entry)
            index.forget(entry)
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


class _Times:
    """When work that looks at many files is to be done again, so that it takes at most a twentieth of the time."""

    def __init__(self) -> None:
        self._next = 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    @contextmanager
    def taking(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        ended = time.monotonic()
        self._next = ended + min(20 * (ended - started), _MOST_SECONDS_BETWEEN)


class _MissLog:
    """Logs why segments are not in a store, each reason once."""

    def __init__(self, store: Store) -> None:
        self._store = store
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
        stored_contexts = self._store.ends_of_contexts(label)
        wanted = asdict(identity)
        for entry in stored_contexts:
            stored = asdict(entry.identity)
            for name, value in wanted.items():
                if stored[name] != value:
                    reasons = {"weights": "other weights", "tokenizer": "another tokenizer or chat template"}
                    return reasons.get(name, f"{name} was '{stored[name]}', now '{value}'")
        if whole and stored_contexts:
            return "the context of this text ends elsewhere: the queries have changed"
        return _ABSENT
