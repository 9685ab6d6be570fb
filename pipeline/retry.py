"""Retries of work that may succeed when it is tried again, with growing waits between the attempts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from pipeline.errors import GenerationFailed, RemoteError

FIRST_WAIT = 1.0  # seconds; each later wait is twice as long
LONGEST_WAIT = 60.0
_SECONDS_BETWEEN_CHECKS = 0.1
_log = logging.getLogger(__name__)


class Attempt:
    """One attempt, used as a context manager. It suppresses an error that may pass, unless it is the last attempt."""

    def __init__(self, is_last: bool, next_wait: float) -> None:
        self._is_last, self._next_wait = is_last, next_wait
        self.succeeded = False

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.succeeded = error is None
        if self._is_last or not isinstance(error, GenerationFailed | RemoteError) or not error.may_pass:
            return False
        _log.warning("%s; trying again in %g s", error, self._next_wait)
        return True


def attempts(retries: int, check: Callable[[], None]) -> Iterator[Attempt]:
    """Yield attempts until one succeeds, at most ``1 + retries``. The last attempt's error is raised.

    GenerationFailed and RemoteError are retried if their ``may_pass`` is true. check: called while waiting; an
    exception it raises ends the wait.

        for attempt in attempts(2, check):
            with attempt:
                result = work()
    """
    wait = FIRST_WAIT
    for left in range(retries, -1, -1):
        attempt = Attempt(is_last=left == 0, next_wait=wait)
        yield attempt
        if attempt.succeeded:
            return
        _wait(wait, check)
        wait = min(2 * wait, LONGEST_WAIT)


def _wait(seconds: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, _SECONDS_BETWEEN_CHECKS))
