"""The scores of a result against gold answers: metrics, confusion of choices, calibration of their probabilities."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from pipeline.evaluation.gold import Gold
from pipeline.evaluation.intervals import Estimate, estimate
from pipeline.evaluation.metrics import METRICS, score_row
from pipeline.models.normalise import normalised
from pipeline.output.results import Results
from pipeline.output.rows import Row

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Answers whose probability is from `low` to below `high`: their mean probability and the share that is right."""

    low: float
    high: float
    rows: int
    probability: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How far probabilities of choices are from accuracies.

    error: the expected calibration error, the mean of |probability - accuracy| over the bins, weighted by their rows
    (Guo et al. 2017, arXiv 1706.04599).
    """

    bins: list[Bin]
    error: float


@dataclass(frozen=True)
class Confusion:
    """How many rows have a gold choice and an answer. answer: None for rows that failed or are missing."""

    gold: str
    answer: str | None
    rows: int


@dataclass(frozen=True)
class Scores:
    """The scores of rows that have gold answers.

    rows: pairs of document and query with gold; answered, failed and missing ones add up to them. cut: answers that
    `max_tokens` cut off. confusion: of one query with choices; empty for others, and for all queries together.
    """

    documents: int
    rows: int
    answered: int
    failed: int
    missing: int
    cut: int
    metrics: dict[str, Estimate]
    calibration: Calibration | None
    confusion: list[Confusion]


@dataclass(frozen=True)
class ResultScores:
    """The scores of a result: of all queries together, and of each. without_gold: rows that no gold belongs to."""

    all: Scores
    queries: dict[str, Scores]
    without_gold: int


def score_result(
    results: Results, gold: Mapping[str, Mapping[str, Gold]], ignore_missing: bool = False
) -> ResultScores:
    """Score an open result. ignore_missing: leave out gold without a row, which otherwise counts as wrong.

    Rows of all queries weigh the same in the scores of all together.
    """
    every = _Tally()
    queries: dict[str, _Tally] = {}
    for document_id, query_id, row, right in _with_gold(results, gold):
        if row is not None or not ignore_missing:
            for tally in (every, queries.setdefault(query_id, _Tally())):
                tally.add(document_id, row, right)
    scores = every.scores(confuse=False)
    return ResultScores(
        scores,
        {query_id: tally.scores() for query_id, tally in queries.items()},
        sum(len(query_ids) for _, query_ids in results.pairs()) - scores.answered - scores.failed,
    )


def _with_gold(results: Results, gold: Mapping[str, Mapping[str, Gold]]) -> Iterator[tuple[str, str, Row | None, Gold]]:
    """Yield each pair that has gold with its row: those of the result's documents first, in its order."""
    seen: set[str] = set()
    for document_id in chain((document_id for document_id, _ in results.pairs()), gold):
        if document_id in gold and document_id not in seen:
            seen.add(document_id)
            rows = results.rows(document_id)
            for query_id, right in gold[document_id].items():
                yield document_id, query_id, rows.get(query_id), right


@dataclass
class _Tally:
    """Collects rows."""

    documents: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    values: dict[str, list[tuple[str, float]]] = field(default_factory=lambda: defaultdict(list))
    choices: dict[str, str] = field(default_factory=dict)  # by their normalised form
    pairs: list[tuple[str | None, list[str]]] = field(default_factory=list)  # answers and their gold answers
    certainties: list[tuple[float, float]] = field(default_factory=list)  # probability and correctness

    def add(self, document_id: str, row: Row | None, gold: Gold) -> None:
        self.documents.add(document_id)
        answered = row is not None and row.status == "ok"
        self.counts["answered" if answered else "missing" if row is None else "failed"] += 1
        self.counts["cut"] += row is not None and row.is_cut
        scores = score_row(row, gold)
        for name, value in scores.items():
            self.values[name].append((document_id, value))
        if gold.answers:
            self.pairs.append((row.answer if row is not None and answered else None, list(gold.answers)))
            probabilities = row.choice_probabilities if row is not None and answered else None
            if row is not None and probabilities:
                self.choices.update((normalised(choice), choice) for choice in probabilities)
                self.certainties.append((probabilities.get(row.answer or "", 0.0), scores["normalised"]))

    def scores(self, confuse: bool = True) -> Scores:
        return Scores(
            len(self.documents),
            self.counts["answered"] + self.counts["failed"] + self.counts["missing"],
            self.counts["answered"],
            self.counts["failed"],
            self.counts["missing"],
            self.counts["cut"],
            {name: estimate(self.values[name]) for name in METRICS if name in self.values},
            _calibrate(self.certainties) if self.certainties else None,
            self._confusion() if confuse and self.choices else [],
        )

    def _confusion(self) -> list[Confusion]:
        counts: Counter[tuple[str, str | None]] = Counter()
        for answer, right in self.pairs:
            forms = [normalised(each) for each in right]
            form = normalised(answer) if answer is not None and normalised(answer) in forms else forms[0]
            counts[self.choices.get(form, right[0]), answer] += 1
        order = sorted(counts.items(), key=lambda item: (item[0][0], item[0][1] is None, item[0][1] or ""))
        return [Confusion(gold, answer, count) for (gold, answer), count in order]


def _calibrate(certainties: list[tuple[float, float]]) -> Calibration:
    """Return the calibration of answers, given as probability and correctness, in bins of equal width."""
    of_bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for probability, right in certainties:
        of_bins[min(BINS - 1, int(probability * BINS))].append((probability, right))
    bins = [
        Bin(
            number / BINS,
            (number + 1) / BINS,
            len(own),
            sum(probability for probability, _ in own) / len(own),
            sum(right for _, right in own) / len(own),
        )
        for number, own in sorted(of_bins.items())
    ]
    error = sum(each.rows * abs(each.probability - each.accuracy) for each in bins) / len(certainties)
    return Calibration(bins, error)
