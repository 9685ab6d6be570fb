"""What a run does about what fails: it tries again, keeps what failed before, or stops.

Knows time and errors; nothing of documents or models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import GenerationFailed, RemoteError

FIRST_WAIT = 1.0  # seconds, and twice as long each time
LONGEST_WAIT = 60.0
DEATHS = 2  # of a model's process, in one place, after which it is not tried there again
_SECONDS_PER_LOOK = 0.1
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnFailure:
    """keep: rows that failed in an earlier run are not tried again. stop: the run ends with the first new one."""

    keep: bool = False
    stop: bool = False


def retried(attempt: Callable[[], _Result], times: int, check: Callable[[], None]) -> _Result:
    """What an attempt gives, which is made again up to so many times while its failure may pass, later each time.

    ``check`` is called now and then while waiting; what it raises ends that. Raises the last failure.
    """
    wait = FIRST_WAIT
    for _ in range(times):
        try:
            return attempt()
        except (GenerationFailed, RemoteError) as error:
            if not error.may_pass:
                raise
            _log.warning("%s; trying again in %g s", error, wait)
        _wait(wait, check)
        wait = min(2 * wait, LONGEST_WAIT)
    return attempt()


def named(documents: Sequence[str]) -> str:
    """Documents that are answered together, in a few words."""
    more = f" and {len(documents) - 1} more" if len(documents) > 1 else ""
    return f"document '{documents[0]}'{more}"


def twice_died(cause: str) -> str:
    """What the rows of a document say that a model's process twice did not survive."""
    return (
        f"the model's process {cause}, twice, while this document was prefilled or answered; try a shorter document, "
        "a smaller generation.batch_size or max_tokens, or fewer cache.key_bits and cache.value_bits"
    )


def _wait(seconds: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, _SECONDS_PER_LOOK))
