"""A limit on the time that a template or a condition may take on one row.

Another thread raises an exception in the thread whose block takes too long. That ends any loop of Python code, and
jinja2 compiles templates to Python code. One such thread serves the process, and ends when it has nothing to watch.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, Thread, get_ident

SECONDS = 10.0
_SECONDS_PER_TICK = 0.1
_IDLE_TICKS = 50  # after which the watching thread ends


class TookTooLong(Exception):
    """A block took longer than its limit."""


@contextmanager
def limited() -> Iterator[None]:
    """Run a block, and raise TookTooLong in it after SECONDS. Time in which the process is stopped hardly counts."""
    seconds, ended = SECONDS, False
    block = _Block(get_ident(), int(seconds / _SECONDS_PER_TICK) + 1)
    _watcher.add(block)
    try:
        try:
            yield
        finally:
            ended = _watcher.remove(block)
            if ended:  # the exception may still be on its way
                time.sleep(_SECONDS_PER_TICK)
    except Exception:
        if not ended:
            raise
    if ended:
        raise TookTooLong(f"it took longer than {seconds:g} s and was ended")


@dataclass(eq=False)
class _Block:
    """A block that runs. thread: in which. left: ticks that it may still take."""

    thread: int
    left: int


class _Watcher:
    """Ends blocks that take too long, in any thread of this process."""

    def __init__(self) -> None:
        self.start_afresh()

    def start_afresh(self) -> None:
        """Forget all blocks and the watching thread. A forked process has no other threads than the one that forked."""
        self._lock = Lock()
        self._blocks: set[_Block] = set()
        self._is_watching = False

    def add(self, block: _Block) -> None:
        with self._lock:
            self._blocks.add(block)
            if not self._is_watching:
                self._is_watching = True
                Thread(target=self._watch, name="time limit", daemon=True).start()

    def remove(self, block: _Block) -> bool:
        """Forget a block, and return whether it was ended."""
        with self._lock:
            self._blocks.discard(block)
            return block.left <= 0

    def _watch(self) -> None:
        idle = 0
        while True:
            time.sleep(_SECONDS_PER_TICK)
            with self._lock:
                idle = 0 if self._blocks else idle + 1
                if idle > _IDLE_TICKS:
                    self._is_watching = False
                    return
                for block in self._blocks:
                    block.left -= 1
                    if block.left == 0:
                        thread, raised = ctypes.c_ulong(block.thread), ctypes.py_object(TookTooLong)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, raised)


_watcher = _Watcher()
os.register_at_fork(after_in_child=_watcher.start_afresh)
