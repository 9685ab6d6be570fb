"""``pipeline score``: how right a result is, against gold answers."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

from pipeline.commands.sections import Section
from pipeline.errors import JobError, suggestion
from pipeline.evaluation.gold import COLUMNS
from pipeline.evaluation.metrics import METRICS
from pipeline.evaluation.scores import ResultScores, Scores

_ALL = "all"
NOTE = (
    "Means over rows, with 95 % intervals from resampled documents. Failed and missing rows count as wrong. "
    "number and date are of rows whose gold answer is one."
)


def parse_bounds(options: Sequence[str]) -> dict[str, float]:
    """Return the least mean of each metric, from options such as ``exact=.9``. Raises JobError."""
    bounds = {}
    for option in options:
        name, _, text = option.partition("=")
        if name not in METRICS:
            raise JobError(f"--min {option}: there is no metric '{name}'{suggestion(name, METRICS)}")
        try:
            bounds[name] = float(text)
        except ValueError:
            bounds[name] = nan
        if not 0 <= bounds[name] <= 1:
            raise JobError(f"--min {option}: expected METRIC=SHARE, a share from 0 to 1, such as exact=.9")
    return bounds


def parse_columns(options: Sequence[str]) -> dict[str, str]:
    """Return the names of the gold's columns, from options such as ``answer=label``. Raises JobError."""
    names = dict(option.partition("=")[::2] for option in options)
    for name, column in names.items():
        if name not in COLUMNS or not column:
            raise JobError(f"--column {name}: expected NAME=COLUMN, where NAME is one of {', '.join(COLUMNS)}")
    return names


def missed_bounds(scores: ResultScores, bounds: dict[str, float]) -> list[str]:
    """Return a message for each metric of all rows that is below its bound, or that no row has."""
    missed = []
    for name, least in bounds.items():
        measured = scores.all.metrics.get(name)
        if measured is None:
            missed.append(f"{name}: no gold answer can be measured by it; expected at least {least:g}")
        elif measured.mean < least:
            missed.append(f"{name} is {measured.mean:.4f}; expected at least {least:g}")
    return missed


def sections(scores: ResultScores) -> list[Section]:
    """Return the tables of scores."""
    named = {_ALL: scores.all} | {f"query {query_id}": own for query_id, own in scores.queries.items()}
    counts = ("documents", "rows", "answered", "failed", "missing", "cut")
    metrics = [name for name in METRICS if name in scores.all.metrics]
    parts = [
        Section(
            "Rows",
            ("", *counts),
            [(name, *(f"{getattr(own, count):,}" for count in counts)) for name, own in named.items()],
            f"Rows of the result without gold: {scores.without_gold:,}.",
        ),
        Section(
            "Scores",
            ("", *metrics),
            [(name, *(str(own.metrics.get(metric, "–")) for metric in metrics)) for name, own in named.items()],
            NOTE,
        ),
    ]
    have_choices = [name for name, own in named.items() if own.calibration]
    for name in have_choices[1:] if len(have_choices) == 2 else have_choices:  # of one query, "all" says nothing more
        parts += _choices(name, named[name])
    return parts


def _choices(name: str, scores: Scores) -> list[Section]:
    parts = []
    if scores.confusion:
        rows = [(each.gold, each.answer or "(none)", f"{each.rows:,}") for each in scores.confusion]
        parts.append(Section(f"Choices, {name}", ("gold", "answer", "rows"), rows))
    if scores.calibration:
        bins = [
            (f"{each.low:.1f} to {each.high:.1f}", f"{each.rows:,}", f"{each.probability:.3f}", f"{each.accuracy:.3f}")
            for each in scores.calibration.bins
        ]
        note = f"The expected calibration error is {scores.calibration.error:.3f}."
        parts.append(
            Section(f"Probabilities, {name}", ("probability", "rows", "mean probability", "right"), bins, note)
        )
    return parts
