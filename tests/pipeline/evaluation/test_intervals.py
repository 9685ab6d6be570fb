"""Intervals on made-up data whose truth is known, and p-values that were worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.intervals import Estimate, estimate, mcnemar


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Documents differ in how hard they are, so rows of one document are alike: 300 results of 40 documents of 5."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        difficulty = generator.beta(2, 2, size=40)  # mean .5
        rows = generator.random((40, 5)) < difficulty[:, None]
        measured = estimate((str(i), float(right)) for i, own in enumerate(rows) for right in own)
        assert measured.low is not None
        assert measured.high is not None
        held += measured.low <= 0.5 <= measured.high
    assert 0.90 <= held / 300 <= 0.98


def test_documents_and_not_rows_are_drawn() -> None:
    rows = [(f"d{i}", float(i % 2)) for i in range(20)]
    once, often = estimate(rows), estimate(rows * 10)  # ten times the same rows say nothing new
    assert (once.low, once.high) == (often.low, often.high)
    assert often.rows == 200


def test_the_same_values_give_the_same_interval() -> None:
    values = [("a", 1.0), ("b", 0.0), ("c", 1.0)]
    assert estimate(values) == estimate(iter(values))


def test_one_document_has_no_interval() -> None:
    assert estimate([("a", 1.0), ("a", 0.0)]) == Estimate(0.5, None, None, 2)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1), (1, 9, 2 * (1 + 10) / 1024), (9, 1, 2 * (1 + 10) / 1024), (3, 3, 1), (0, 6, 2 / 64)],
)
def test_mcnemar_is_the_two_sided_binomial_test(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar(only_first, only_second) == pytest.approx(p)


def test_mcnemar_of_many_rows() -> None:
    assert mcnemar(5000, 5200) == pytest.approx(0.0487, abs=0.001)  # the normal approximation, corrected: .0488
