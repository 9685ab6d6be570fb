"""Gold answers: what is known to be right, read from Parquet, JSON Lines or CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.files.columns import ANYTHING, ID, Column
from pipeline.files.csv_tables import Csv
from pipeline.files.encoding import wrong_character
from pipeline.files.json_lines import JsonLines
from pipeline.files.parquet import Parquet
from pipeline.files.tables import Table

COLUMNS = ("document_id", "query_id", "answer", "evidence")
_OPTIONAL = "evidence"
_OPTION = "--gold"
_ROWS_PER_BATCH = 64


@dataclass(frozen=True)
class Span:
    """A passage: its place in the document's text, in characters, and its text. A place of -1 is unknown."""

    start: int
    end: int
    text: str = ""

    @property
    def has_place(self) -> bool:
        """Whether the place is known."""
        return self.start >= 0


@dataclass(frozen=True)
class Gold:
    """The gold answers to one query about one document. None stands for what is not known.

    answers: each of them is right; if there are none, no answer is right. evidence: the passages that show the answer;
    empty if there are none in the document.
    """

    answers: Sequence[str] | None = None
    evidence: Sequence[Span] | None = None

    def __add__(self, other: Gold) -> Gold:
        return Gold(_joined(self.answers, other.answers), _joined(self.evidence, other.evidence))


def read_gold(path: str, names: Mapping[str, str] | None = None) -> dict[str, dict[str, Gold]]:
    """Return what is right, by document id and query id. Several rows of a pair are joined.

    names: of the file's columns, for those of COLUMNS that have another name there. Raises InputError.
    """
    column_of = {name: (names or {}).get(name, name) for name in COLUMNS}
    gold: dict[str, dict[str, Gold]] = {}
    for place, values in _rows(path, column_of):
        for name in ("document_id", "query_id"):
            if not isinstance(values[name], str | int):
                raise InputError(f"{_OPTION}: the column '{column_of[name]}' in {place} is empty; expected an id")
        read = Gold(
            _answers(values["answer"], f"the column '{column_of['answer']}' in {place}"),
            _evidence(values["evidence"], f"the column '{column_of['evidence']}' in {place}"),
        )
        queries, query_id = gold.setdefault(str(values["document_id"]), {}), str(values["query_id"])
        queries[query_id] = joined = queries.get(query_id, Gold()) + read
        if len({span.has_place for span in joined.evidence or ()}) > 1:
            raise InputError(f"{_OPTION}: {place}: the evidence of a pair is both texts and spans; give one kind")
    if not gold:
        raise InputError(f"{_OPTION}: {path} has no rows")
    return gold


def _rows(path: str, column_of: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    kinds = {"document_id": ID, "query_id": ID}
    needed = [
        Column(column, f"{_OPTION} needs", kinds.get(name, ANYTHING))
        for name, column in column_of.items()
        if name != _OPTIONAL or name != column
    ]
    table = Table(path, _OPTION, needed, formats=(Parquet(), JsonLines(), Csv()))
    table.check()
    for record in table.records(column_of.values(), _ROWS_PER_BATCH):
        for name in column_of.values():
            if reason := record.unreadable(name):
                raise InputError(f"{_OPTION}: {reason}")
        yield record.place, {name: record.values[column] for name, column in column_of.items()}


def _answers(value: Any, place: str) -> list[str] | None:
    if value is None:
        return None
    answers = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, bool):
            answers.append(str(each).lower())
        elif isinstance(each, str | int | float):
            answers.append(str(each))
        else:
            raise InputError(f"{_OPTION}: {place} has {_named(each)}; expected a text, a number or a list of them")
        _check_text(answers[-1], place)
    return answers


def _evidence(value: Any, place: str) -> list[Span] | None:
    if value is None:
        return None
    spans = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str):
            _check_text(each, place)
            spans.append(Span(-1, -1, each))
        elif isinstance(each, dict) and all(type(each.get(name)) is int for name in ("start", "end")):
            spans.append(Span(each["start"], each["end"]))
            if not 0 <= each["start"] < each["end"]:
                raise InputError(f"{_OPTION}: {place} has a span from {each['start']} to {each['end']}")
        else:
            raise InputError(
                f"{_OPTION}: {place} has {_named(each)}; expected texts or spans, such as "
                '{"start": 10, "end": 24}, in characters'
            )
    return spans


def _check_text(text: str, place: str) -> None:
    if reason := wrong_character(text):
        raise InputError(f"{_OPTION}: {place} {reason}")


def _named(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _joined(ours: Sequence[Any] | None, theirs: Sequence[Any] | None) -> Sequence[Any] | None:
    return [*(ours or ()), *(theirs or ())] if ours is not None or theirs is not None else None
