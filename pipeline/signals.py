"""SIGINT and SIGTERM: who handles them, for how long, and how a run notices that it should stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from pipeline.errors import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_log = logging.getLogger(__name__)


@contextmanager
def stops_handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle STOP_SIGNALS with ``handler`` while the block runs, even where a shell had a signal ignored.

    In another thread than the main one, which Python gives no signals, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def stops_held_back() -> Iterator[None]:
    """Block STOP_SIGNALS while the block runs. A process started in it has them blocked until it unblocks them."""
    # Python starts its resource tracker with the first process, and that unblocks the signals: so it is started first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class InterruptFlag:
    """Remembers that the user asked to stop. The first signal sets the flag; a second one stops at once."""

    def __init__(self) -> None:
        self.is_set = False

    def check(self) -> None:
        """Raise Interrupted if the user asked to stop."""
        if self.is_set:
            raise Interrupted("interrupted")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Set the flag on STOP_SIGNALS while the block runs. A second signal raises KeyboardInterrupt."""

        def note(number: int, frame: Any) -> None:
            if self.is_set:
                raise KeyboardInterrupt
            self.is_set = True
            _log.warning("interrupted: the rows in hand are finished first; interrupt again to stop at once")

        with stops_handled(note):
            yield
