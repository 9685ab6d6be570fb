"""Which contenders a bench has, and what each comes back with. Knows names and figures alone."""

from __future__ import annotations

from dataclasses import dataclass

NAIVE, COPIED, COLD, WARM = "naive", "copied", "pipeline-cold", "pipeline-warm"
CONTENDERS = (NAIVE, "reloaded", COPIED, "quantized", COLD, WARM)  # in the order in which they run
Pair = tuple[str, str]  # the ids of a document and a query


@dataclass(frozen=True)
class Outcome:
    """What a contender did, without loading the model: seconds, bytes, and its answers.

    ``left_out`` counts the pairs that no contender can answer, being too long or not fit for the prompt.
    """

    answers: dict[Pair, str]
    answer_tokens: int
    left_out: int
    prefill_seconds: float
    disk_bytes: int
    seconds: float
    peak_bytes: int
    extra_bytes: int
