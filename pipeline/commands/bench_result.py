"""The contenders of a bench, the result of each, and the row of figures that is made from it.

This module imports neither MLX nor NumPy, so that the process that starts the contenders stays small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NAIVE, COPIED, COLD, WARM = "naive", "copied", "pipeline-cold", "pipeline-warm"
CONTENDERS = (NAIVE, "reloaded", COPIED, "quantized", COLD, WARM)  # in the order in which they run
Pair = tuple[str, str]  # the ids of a document and a query
Resident = Literal["packed", "dense"]


@dataclass(frozen=True)
class BenchResult:
    """The answers of one contender, and its seconds and bytes without those of loading the model.

    left_out: number of pairs that no contender can answer, since they are too long or not fit for the prompt.
    """

    answers: dict[Pair, str]
    answer_tokens: int
    left_out: int
    prefill_seconds: float
    disk_bytes: int
    seconds: float
    peak_bytes: int
    extra_bytes: int


@dataclass(frozen=True)
class BenchRow:
    """One contender's figures, which are None if it failed or if they are unknown.

    resident: how the pipeline held prefixes in memory. extra_bytes: peak memory beyond the memory that was used when
    the model had been loaded. agreement: share, from 0 to 1, of the pairs that naive answered too and that have the
    same answer. failed: the reason of a failure. applies: False if mlx-lm cannot do this with this model or job, which
    is no error.
    """

    contender: str
    resident: Resident | None
    seconds: float | None = None
    answers: int | None = None
    answers_per_second: float | None = None
    answer_tokens: int | None = None
    tokens_per_second: float | None = None
    prefill_seconds: float | None = None
    peak_bytes: int | None = None
    extra_bytes: int | None = None
    disk_bytes: int | None = None
    agreement: float | None = None
    failed: str | None = None
    applies: bool = True

    @property
    def name(self) -> str:
        """The contender, and how it held prefixes."""
        return display_name(self.contender, self.resident)


def display_name(contender: str, resident: Resident | None) -> str:
    """Return the name of a contender as it is shown."""
    return f"{contender} ({resident})" if resident else contender
