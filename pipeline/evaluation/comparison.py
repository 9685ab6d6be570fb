"""Two results beside each other: what made them, where they agree, and which of them is better by gold answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.evaluation.gold import Gold
from pipeline.evaluation.intervals import Estimate, estimate, mcnemar
from pipeline.evaluation.metrics import score_row
from pipeline.models.normalise import normalised
from pipeline.output.results import Results
from pipeline.output.rows import Row


@dataclass
class Side:
    """Numbers of one result. alone: rows that the other one lacks. cut: answers that `max_tokens` cut off."""

    rows: int = 0
    alone: int = 0
    failed: int = 0
    cut: int = 0
    answer_tokens: int = 0

    def add(self, row: Row, other: Row | None) -> None:
        """Count a row. other: the row of the same pair in the other result."""
        self.rows += 1
        self.alone += other is None
        self.failed += row.status == "error"
        self.cut += row.is_cut
        self.answer_tokens += row.answer_tokens or 0


@dataclass(frozen=True)
class Agreement:
    """Shares of the rows that both results answered: the same text, and the same text after normalisation."""

    exact: Estimate
    normalised: Estimate


@dataclass(frozen=True)
class Difference:
    """A pair whose rows differ. first, second: answers; None for a row that failed or is missing."""

    document_id: str
    query_id: str
    first: str | None
    second: str | None
    first_error: str | None
    second_error: str | None
    gold: list[str] | None


@dataclass(frozen=True)
class Judgement:
    """Two results against gold answers, on the pairs that both results have a row for.

    both, only_first, only_second, neither: rows that are right after normalisation. p: of McNemar's exact test.
    f1_difference: mean F1 of the second result minus that of the first.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    p: float
    first_f1: Estimate
    second_f1: Estimate
    f1_difference: Estimate


@dataclass(frozen=True)
class Comparison:
    """Two results. made: the entries of their files' metadata that differ, by key; None where there is none.

    agreement: of all rows that both answered, and by query; None if there are none. gold: None if no gold belongs to
    rows that both have.
    """

    made: dict[str, tuple[str | None, str | None]]
    first: Side
    second: Side
    agreement: Agreement | None
    queries: dict[str, Agreement]
    gold: Judgement | None
    differences: list[Difference]


def compare_results(
    first: Results, second: Results, gold: Mapping[str, Mapping[str, Gold]] | None = None
) -> Comparison:
    """Compare two open results, document by document."""
    sides = Side(), Side()
    every = _Agreements()
    queries: dict[str, _Agreements] = {}
    judged: list[tuple[str, dict[str, float], dict[str, float]]] = []
    differences = []
    for ours, theirs in _pairs(first, second):
        for side, row, other in ((sides[0], ours, theirs), (sides[1], theirs, ours)):
            if row is not None:
                side.add(row, other)
        row = ours or theirs
        assert row is not None
        right = (gold or {}).get(row.document_id, {}).get(row.query_id)
        if ours is not None and theirs is not None:
            for agreements in (every, queries.setdefault(row.query_id, _Agreements())):
                agreements.add(ours, theirs)
            if right is not None and right.answers is not None:
                judged.append((row.document_id, score_row(ours, right), score_row(theirs, right)))
        if _differ(ours, theirs):
            answers = None if right is None or right.answers is None else list(right.answers)
            texts, errors = (_answer(ours), _answer(theirs)), (_error(ours), _error(theirs))
            differences.append(Difference(row.document_id, row.query_id, *texts, *errors, answers))
    return Comparison(
        _different(_flat(first.metadata), _flat(second.metadata)),
        *sides,
        every.agreement(),
        {query_id: agreement for query_id, own in queries.items() if (agreement := own.agreement())},
        _judge(judged) if judged else None,
        differences,
    )


def _pairs(first: Results, second: Results) -> Iterator[tuple[Row | None, Row | None]]:
    """Yield the rows of each pair, in the first result's order, then those that only the second has."""
    seen: set[str] = set()
    for results in (first, second):
        for document_id, _ in results.pairs():
            if document_id not in seen:
                seen.add(document_id)
                ours, theirs = first.rows(document_id), second.rows(document_id)
                for query_id in dict.fromkeys([*ours, *theirs]):
                    yield ours.get(query_id), theirs.get(query_id)


@dataclass
class _Agreements:
    exact: list[tuple[str, float]] = field(default_factory=list)
    normalised: list[tuple[str, float]] = field(default_factory=list)

    def add(self, ours: Row, theirs: Row) -> None:
        if ours.status == theirs.status == "ok":
            first, second = ours.answer or "", theirs.answer or ""
            self.exact.append((ours.document_id, float(first == second)))
            self.normalised.append((ours.document_id, float(normalised(first) == normalised(second))))

    def agreement(self) -> Agreement | None:
        return Agreement(estimate(self.exact), estimate(self.normalised)) if self.exact else None


def _judge(judged: list[tuple[str, dict[str, float], dict[str, float]]]) -> Judgement:
    right = [(ours["normalised"] == 1, theirs["normalised"] == 1) for _, ours, theirs in judged]
    only_first, only_second = right.count((True, False)), right.count((False, True))
    return Judgement(
        right.count((True, True)),
        only_first,
        only_second,
        right.count((False, False)),
        mcnemar(only_first, only_second),
        estimate((document_id, ours["f1"]) for document_id, ours, _ in judged),
        estimate((document_id, theirs["f1"]) for document_id, _, theirs in judged),
        estimate((document_id, theirs["f1"] - ours["f1"]) for document_id, ours, theirs in judged),
    )


def _differ(ours: Row | None, theirs: Row | None) -> bool:
    """Return whether two rows differ in their answers, or only one of them is an answer."""
    if ours is None or theirs is None or ours.status != theirs.status:
        return True
    return ours.status == "ok" and ours.answer != theirs.answer


def _answer(row: Row | None) -> str | None:
    return row.answer or "" if row is not None and row.status == "ok" else None


def _error(row: Row | None) -> str | None:
    if row is None:
        return "no such row"
    if row.status == "skipped":
        return "skipped"
    return None if row.status == "ok" else f"{row.error_type}: {row.error}"


def _different(ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    keys = sorted({*ours, *theirs})
    return {key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


def _flat(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata in which values of JSON are replaced by their parts: an entry for each key, or for each id."""
    flat: dict[str, str] = {}
    for key, text in metadata.items():
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        if isinstance(value, list) and all(isinstance(part, dict) and "id" in part for part in value):
            value = {str(part["id"]): part for part in value}
        if isinstance(value, dict):
            parts = {
                f"{key}.{name}": part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)
                for name, part in value.items()
            }
            flat |= _flat(parts)
        else:
            flat[key] = text
    return flat
