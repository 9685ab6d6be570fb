"""A database in a temporary file, for what is too much to be held in memory.

The file has no name, so it is gone when the process is, however that ends. Knows SQLite; nothing of what is set down.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import PipelineError

_CACHE_KILOBYTES = 32 << 10


def temporary_database(owner: object, tables: str) -> sqlite3.Connection:
    """A database with these tables, amid a transaction; used by one thread at a time, and closed with its owner."""
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    weakref.finalize(owner, database.close)
    database.execute(f"PRAGMA cache_size = -{_CACHE_KILOBYTES}")
    database.execute("PRAGMA journal_mode = OFF")
    database.executescript(tables)
    database.execute("BEGIN")
    return database


@contextmanager
def spill_errors(what: str) -> Iterator[None]:
    """Raise PipelineError, which says what cannot be set down, for what SQLite raises in the block."""
    try:
        yield
    except sqlite3.Error as error:
        raise PipelineError(
            f"{what} cannot be set down in a temporary file: {error}; free some space, or set TMPDIR to a folder "
            "that has some"
        ) from None
