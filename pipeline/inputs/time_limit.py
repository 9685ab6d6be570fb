"""A limit on the time that a template or a condition may take on one row.

Another thread raises an exception in the thread whose block takes too long. That ends any loop of Python code, and
jinja2 compiles templates to Python code.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, Thread, get_ident

SECONDS = 10.0
_SECONDS_PER_TICK = 0.1
_IDLE_TICKS = 50  # after which the watching thread ends


class TookTooLong(Exception):
    """A block took longer than its limit."""


class TimeLimit:
    """Ends blocks that take too long. Any thread may use it. Time in which the process is stopped hardly counts."""

    def __init__(self) -> None:
        self._seconds = SECONDS
        self._lock = Lock()
        self._left: dict[int, int] = {}  # ticks left of each block that runs, by thread
        self._is_watched = False

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Run a block, and raise TookTooLong in it after SECONDS."""
        thread, ended = get_ident(), False
        with self._lock:
            self._left[thread] = int(self._seconds / _SECONDS_PER_TICK) + 1
            if not self._is_watched:
                self._is_watched = True
                Thread(target=self._watch, name="time limit", daemon=True).start()
        try:
            try:
                yield
            finally:
                with self._lock:
                    ended = self._left.pop(thread, 0) <= 0
                if ended:  # the exception may still be on its way
                    time.sleep(_SECONDS_PER_TICK)
        except Exception:
            if not ended:
                raise
        if ended:
            raise TookTooLong(f"it took longer than {self._seconds:g} s and was ended")

    def _watch(self) -> None:
        idle = 0
        while True:
            time.sleep(_SECONDS_PER_TICK)
            with self._lock:
                idle = 0 if self._left else idle + 1
                if idle > _IDLE_TICKS:
                    self._is_watched = False
                    return
                for thread in self._left:
                    self._left[thread] -= 1
                    if self._left[thread] == 0:
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(TookTooLong)
                        )
