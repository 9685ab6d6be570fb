"""How far chance alone may move a figure: bootstrap intervals that resample documents, and McNemar's exact test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

REPLICATES = 1000
LEVEL = 0.95
_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over rows, with the 95 % interval in which it may lie; None if fewer than two documents were measured."""

    mean: float
    low: float | None
    high: float | None
    rows: int

    def __str__(self) -> str:
        interval = f" [{self.low:.3f}, {self.high:.3f}]" if self.low is not None and self.high is not None else ""
        return f"{self.mean:.3f}{interval}"


def estimate(values: Iterable[tuple[str, float]]) -> Estimate:
    """Return the mean of at least one value, and its percentile interval (Efron 1979).

    values: each with the id of its document. Answers from one document depend on each other, so whole documents are
    drawn with replacement. The draws have a fixed seed: the same values give the same interval.
    """
    of_documents: dict[str, list[float]] = defaultdict(list)
    for document_id, value in values:
        of_documents[document_id].append(value)
    sums = np.array([sum(own) for own in of_documents.values()])
    counts = np.array([len(own) for own in of_documents.values()], dtype=np.float64)
    mean, rows = float(sums.sum() / counts.sum()), int(counts.sum())
    if len(sums) < 2:
        return Estimate(mean, None, None, rows)
    draws = _draws(len(sums))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile((draws @ sums) / (draws @ counts), [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), rows)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947).

    only_first, only_second: how many rows only one of two results has right. The value is the probability of a split
    at least as uneven if both were equally good, and rows did not depend on each other.
    """
    count = only_first + only_second
    at_most = splits = 1  # of `number` rows to the result that has fewer
    for number in range(min(only_first, only_second)):
        splits = splits * (count - number) // (number + 1)
        at_most += splits
    return min(1.0, at_most / 2 ** (count - 1)) if count else 1.0


@lru_cache(maxsize=8)
def _draws(documents: int) -> Any:
    """Return how often each document is drawn in each replicate: [REPLICATES, documents]."""
    generator = np.random.default_rng(_SEED)
    drawn = (generator.integers(documents, size=documents) for _ in range(REPLICATES))
    return np.stack([np.bincount(each, minlength=documents) for each in drawn]).astype(np.float64)
