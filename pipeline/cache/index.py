"""The index of a store: its entries in SQLite, so that no run reads the whole folder for each document.

    <cache dir>/index.sqlite

The folder stays the truth, and the index is made from it: `Index.sync` reads those folders of segments that have
changed since, which it knows by their times. Looking at all folders takes milliseconds, so runs tell the index what
they change (`refresh`, `forget`), and it is brought up to date only now and then. An index that is damaged, foreign or
lost is made again, and a store that may not be written has its index in memory. It is used only by the holder of the
store's write lock. So machines that share a network folder never use it together, and if their file system loses its
changes nevertheless, the index only makes worse choices of what to evict: no answer depends on it.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import astuple, fields
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from pipeline.cache.entries import (
    REJECTED,
    WRITTEN_IN_PART,
    Entry,
    is_key,
    list_buckets,
    list_keys,
    read_entry,
)
from turboquant.io.atomic import IrregularFile, open_folder
from turboquant.io.identity import FORMAT_VERSION
from turboquant.io.segment_file import MANIFEST

INDEX = "index.sqlite"
JOURNAL = f"{INDEX}-journal"
_VERSION = 1000 * FORMAT_VERSION + 1  # of the tables, and of the manifests that they were made from
_TYPES = {"str": ("TEXT", str), "int": ("INTEGER", int), "float": ("REAL", float), "bool": ("INTEGER", int)}
_COLUMNS = {field.name: _TYPES[str(field.type)] for field in fields(Entry)}
_READ_AS = [python for _, python in _COLUMNS.values()]
_SCHEMA = [
    "CREATE TABLE buckets (name TEXT PRIMARY KEY, changed INTEGER, bytes INTEGER)",
    f"CREATE TABLE entries ({', '.join(f'{name} {column}' for name, (column, _) in _COLUMNS.items())}, "
    "depth INTEGER, PRIMARY KEY (bucket, key)) WITHOUT ROWID",
    "CREATE INDEX by_use ON entries (used, depth, key) WHERE problem = ''",
    "CREATE INDEX by_problem ON entries (problem) WHERE problem != ''",
    "CREATE INDEX by_parent ON entries (parent, used) WHERE parent != ''",
    "CREATE INDEX by_label ON entries (label) WHERE label != ''",
    "CREATE INDEX by_output ON entries (output) WHERE output != ''",
]
_TICK = 20_000_000  # nanoseconds: a folder that changes twice within the clock's tick may keep its time
_MOST_NEEDED = 1000  # entries that unfinished jobs need, and that are passed over in one search

IndexMode = Literal["keep", "copy", "make"]
DAMAGED = (sqlite3.Error, ValueError, TypeError, OverflowError)  # what a damaged or foreign index may raise


class Index:
    """The entries of a store. All methods raise one of ``DAMAGED`` if the index is damaged, and OSError.

    store: the store's folder. mode: ``keep`` for an index in the store; ``copy`` for a copy of that in memory, and
    ``make`` for a new one in memory. is_new: whether it was made now and knows no entries.
    """

    def __init__(self, store: Path, mode: IndexMode = "keep") -> None:
        self._store, self.is_new = store, False
        self._database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        try:
            if mode == "keep":
                self._database.close()
                self._database = _connect(store, "rwc")
                self._database.execute("PRAGMA synchronous = OFF")  # after a power cut it is made again, if it is bad
            elif mode == "copy" and (store / INDEX).exists():
                with closing(_connect(store, "ro")) as source:
                    source.backup(self._database)
            self._prepare()
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    @staticmethod
    def discard(store: Path) -> None:
        """Remove a damaged index. Raises OSError."""
        with suppress(FileNotFoundError), open_folder(store) as folder:
            folder.remove(JOURNAL)
            folder.remove(INDEX)

    def begin(self) -> None:
        """Begin changes, which `commit` keeps."""
        if not self._database.in_transaction:
            self._database.execute("BEGIN IMMEDIATE")

    def sync(self, thorough: bool = False) -> None:
        """Bring the index up to date with the store.

        thorough: also look at all folders and manifests, which finds segments that were changed or used since.
        """
        run, self.is_new = self._database.execute, False
        known = dict(run("SELECT name, changed FROM buckets").fetchall())
        found = dict(list_buckets(self._store))
        for name in known.keys() - found.keys():
            run("DELETE FROM entries WHERE bucket = ?", (name,))
            run("DELETE FROM buckets WHERE name = ?", (name,))
        for name, changed in found.items():
            if thorough or known.get(name) != changed:
                self._sync_bucket(name, changed)
        for bucket, key in run(
            "SELECT bucket, key FROM entries WHERE problem != '' AND problem = ?", (WRITTEN_IN_PART,)
        ).fetchall():
            self._read(bucket, key)  # it may be complete by now, which does not change the bucket's time
        if thorough:
            rows = run("SELECT bucket, key, used FROM entries WHERE bucket != ?", (REJECTED,)).fetchall()
            for bucket, key, used in rows:
                if self._time_of_use(bucket, key) != used:
                    self._read(bucket, key)

    def refresh(self, keys: Iterable[str]) -> None:
        """Bring the entries of these keys up to date with the store."""
        for key in keys:
            self._database.execute("INSERT OR IGNORE INTO buckets VALUES (?, 0, 0)", (key[:2],))
            self._read(key[:2], key)

    def commit(self) -> None:
        """Keep all changes since `begin`."""
        if self._database.in_transaction:
            self._database.execute("COMMIT")

    def segment_bytes(self) -> int:
        """Return the bytes of all entries."""
        return int(self._database.execute("SELECT total(bytes) FROM buckets").fetchone()[0])

    def entries(self) -> Iterator[Entry]:
        """Yield all entries in the order of their keys, the rejected ones first."""
        yield from self._select("ORDER BY bucket = ? DESC, key", REJECTED)

    def count(self) -> int:
        """Return the number of entries."""
        return int(self._database.execute("SELECT count(*) FROM entries").fetchone()[0])

    def contexts(self, label: str | None = None) -> Iterator[Entry]:
        """Yield the last segment of each context: of all, or of those of one label."""
        if label is None:
            yield from self._select("WHERE problem = '' AND label != '' AND whole")
        elif label:
            yield from self._select("WHERE label != '' AND label = ? AND problem = '' AND whole", label)

    def built_by(self, output: str) -> list[Entry]:
        """Return the segments that a job has built, each after those that continue it."""
        return list(self._select("WHERE output != '' AND output = ? AND problem = '' ORDER BY depth", output))

    def of_keys(self, keys: Iterable[str]) -> list[Entry]:
        """Return the usable segments of these keys, each after those that continue it."""
        found = [entry for key in keys for entry in self._select("WHERE bucket = ? AND key = ?", key[:2], key)]
        return sorted((entry for entry in found if not entry.problem), key=lambda entry: -entry.start)

    def has_children(self, entry: Entry) -> bool:
        """Return whether the store has a segment that continues this one."""
        return self._last_use_of_children(entry) is not None

    def next_to_evict(self, is_needed: Callable[[Entry], bool], thorough: bool = False) -> Entry | None:
        """Return the entry to be removed first, or None if all are needed.

        Entries with a problem come first, then the least recently used. A segment comes after all segments that
        continue it, and it is kept while one of them is needed. Only some needed ones are passed over in one search,
        and they come last in the next one. thorough: pass over any number.
        """
        for entry in self._select("WHERE problem != '' LIMIT 1"):
            return entry
        run = self._database.execute
        place: tuple[float, int, str] = (float("-inf"), 0, "")
        last = max(time.time(), run("SELECT coalesce(max(used), 0) FROM entries WHERE problem = ''").fetchone()[0]) + 1
        passed: set[str] = set()
        while thorough or len(passed) < _MOST_NEEDED:
            found = next(
                self._select(
                    "WHERE problem = '' AND (used, depth, key) > (?, ?, ?) ORDER BY used, depth, key LIMIT 1", *place
                ),
                None,
            )
            if found is None or found.key in passed:
                return None
            place = found.used, -found.start, found.key
            used = self._time_of_use(found.bucket, found.key)
            of_children = self._last_use_of_children(found)
            later = max(used or 0.0, of_children or 0.0)
            if used is None:
                self.forget(found)
            elif later > found.used:  # it was used since it was indexed, or the segments that continue it were
                self._set_used(found, later)
            elif of_children is not None or is_needed(found):
                passed.add(found.key)
                self._set_used(found, last)
            else:
                return found
        return None

    def forget(self, entry: Entry) -> None:
        """Take an entry out of the index, because its folder is removed."""
        self._database.execute("DELETE FROM entries WHERE bucket = ? AND key = ?", (entry.bucket, entry.key))
        self._database.execute("UPDATE buckets SET bytes = bytes - ? WHERE name = ?", (entry.bytes, entry.bucket))

    def _prepare(self) -> None:
        """Make the tables of an empty database. Raises ValueError if there are others than those made here."""
        run = self._database.execute
        made = [text for (text,) in run("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()]
        version = run("PRAGMA user_version").fetchone()[0]
        if not made and version == 0:
            run("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                run(statement)
            run(f"PRAGMA user_version = {_VERSION}")
            run("COMMIT")
            self.is_new = True
        elif sorted(made) != sorted(_SCHEMA) or version != _VERSION:
            raise ValueError("it was made by another program or version")

    def _sync_bucket(self, bucket: str, changed: int) -> None:
        run = self._database.execute
        keys = set(list_keys(self._store, bucket))
        known = {key for (key,) in run("SELECT key FROM entries WHERE bucket = ?", (bucket,))}
        for key in known - keys:
            run("DELETE FROM entries WHERE bucket = ? AND key = ?", (bucket, key))
        if time.time_ns() - changed < _TICK:
            changed = 0  # read it again the next time
        run("INSERT OR REPLACE INTO buckets VALUES (?, ?, 0)", (bucket, changed))
        for key in keys - known:
            self._read(bucket, key)
        run(
            "UPDATE buckets SET bytes = (SELECT total(bytes) FROM entries WHERE bucket = ?) WHERE name = ?",
            (bucket, bucket),
        )

    def _read(self, bucket: str, key: str) -> None:
        """Read an entry from the store into the index."""
        for known in self._select("WHERE bucket = ? AND key = ?", bucket, key):
            self.forget(known)
        entry = read_entry(self._store, bucket, key)
        if entry is not None:
            places = ", ".join("?" * (len(_COLUMNS) + 1))
            self._database.execute(f"INSERT INTO entries VALUES ({places})", (*astuple(entry), -entry.start))
            self._database.execute("UPDATE buckets SET bytes = bytes + ? WHERE name = ?", (entry.bytes, bucket))

    def _select(self, condition: str, *values: object) -> Iterator[Entry]:
        for row in self._database.execute(f"SELECT {', '.join(_COLUMNS)} FROM entries {condition}", values):
            if list(map(type, row)) != _READ_AS:  # SQLite keeps any type in any column
                raise ValueError("an entry has a value of another type")
            entry = Entry(*row)
            if not is_key(entry.key, entry.bucket):
                raise ValueError("an entry has no valid name")
            yield entry

    def _last_use_of_children(self, entry: Entry) -> float | None:
        statement = "SELECT max(used) FROM entries WHERE parent != '' AND parent = ? AND problem = ''"
        used: float | None = self._database.execute(statement, (entry.key,)).fetchone()[0]
        return used

    def _set_used(self, entry: Entry, used: float) -> None:
        statement = "UPDATE entries SET used = ? WHERE bucket = ? AND key = ?"
        self._database.execute(statement, (used, entry.bucket, entry.key))

    def _time_of_use(self, bucket: str, key: str) -> float | None:
        try:
            return os.stat(self._store / bucket / key / MANIFEST, follow_symlinks=False).st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None


def _connect(store: Path, mode: str) -> sqlite3.Connection:
    """Open the index of a store. Raises ValueError if a link or something else is in its place.

    SQLite would follow a link that another user puts there between this check and its own opening; it would then write
    to a file that is a database already, or is empty.
    """
    for name in (INDEX, JOURNAL):
        try:
            with suppress(FileNotFoundError), open_folder(store) as folder, folder.open(name):
                pass
        except IrregularFile as error:
            raise ValueError(f"{name}: {error}") from None
    uri = f"file:{quote(str((store / INDEX).absolute()))}?mode={mode}"
    database = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA trusted_schema = OFF")
        if mode == "rwc":
            database.execute("PRAGMA page_size = 1024")  # a new store is small
            database.execute("PRAGMA journal_mode = TRUNCATE")
    except BaseException:
        database.close()
        raise
    return database
