"""Locks between the processes that share a store: a lock is a file in ``<cache dir>/locks`` that one process holds.

The lock of a process that ends, however it ends, is free. The file stays.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from turboquant.io.atomic import open_folder

LOCKS = "locks"
_log = logging.getLogger(__name__)


class Lock:
    """A lock of a store. The folder of locks is made; a link in its place or in the file's raises OSError."""

    def __init__(self, store: Path, name: str) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with open_folder(store / LOCKS, store, make=True) as folder:
            self._descriptor = os.open(f"{name}.lock", flags, 0o666, dir_fd=folder.descriptor)

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock, and return whether this was possible. On a file system without locks, it always is."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            _log.debug("no lock: %s", error)
        return True

    def release(self) -> None:
        """Release the lock, which is not used again."""
        os.close(self._descriptor)
