"""A database in a temporary file, for tables that are too large for memory.

The file has no name, so it disappears with the process, however the process ends.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import PipelineError

_CACHE_KILOBYTES = 32 << 10


def temporary_database(owner: object, tables: str) -> sqlite3.Connection:
    """Open a new SQLite database and begin a transaction in it.

    owner: the object that uses the database, which is closed when the owner is garbage-collected. tables: SQL that
    creates the tables. Any thread may use the database, but only one at a time.
    """
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    weakref.finalize(owner, database.close)
    database.execute(f"PRAGMA cache_size = -{_CACHE_KILOBYTES}")
    database.execute("PRAGMA journal_mode = OFF")
    database.executescript(tables)
    database.execute("BEGIN")
    return database


@contextmanager
def spill_errors(contents: str) -> Iterator[None]:
    """Raise PipelineError for an error of SQLite in the block. `contents` says what is stored, such as "queries"."""
    try:
        yield
    except sqlite3.Error as error:
        raise PipelineError(
            f"{contents} cannot be written to a temporary file: {error}; free some space, or set TMPDIR to a folder "
            "on a disk that has space"
        ) from None
