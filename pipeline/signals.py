"""What asks a process to stop, and who heeds it for how long. Knows signals; nothing of what is stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stops_handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """While the block runs, STOP_SIGNALS are the handler's, also where a shell had one ignored."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def stops_held_back() -> Iterator[None]:
    """While the block runs, STOP_SIGNALS wait; a process started in it has them blocked until it lets them in."""
    # Python's resource tracker is started with the first process and lets the signals in again, so it comes first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
