"""``pipeline compare``: two results beside each other."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.commands.sections import Section
from pipeline.evaluation.comparison import Comparison, Difference, Judgement
from pipeline.printable import printable

_LONGEST = 100  # characters of an entry of the metadata


def sections(comparison: Comparison) -> list[Section]:
    """Return the tables about all rows. A and B stand for the two results."""
    counts = ("rows", "alone", "failed", "cut", "answer_tokens")
    sides = {"A": comparison.first, "B": comparison.second}
    parts = [
        Section(
            "Rows",
            ("", *(count.replace("_", " ") for count in counts)),
            [(name, *(f"{getattr(side, count):,}" for count in counts)) for name, side in sides.items()],
            "alone: rows that the other result lacks. cut: answers that max_tokens cut off.",
        )
    ]
    if comparison.made:
        made = [(key, *map(_short, values)) for key, values in comparison.made.items()]
        parts.append(Section("What made them", ("", "A", "B"), made, "Entries of the files' metadata that differ."))
    if comparison.agreement:
        named = {"all": comparison.agreement}
        named |= {f"query {query_id}": agreement for query_id, agreement in comparison.queries.items()}
        rows = [(name, f"{own.exact.rows:,}", str(own.exact), str(own.normalised)) for name, own in named.items()]
        note = "Of rows that both results answered, with 95 % intervals from resampled documents."
        parts.append(Section("Agreement", ("", "rows", "exact", "normalised"), rows, note))
    if comparison.gold:
        parts.append(_judgement(comparison.gold))
    return parts


def differences_section(comparison: Comparison) -> Section:
    """Return the table of all rows that differ."""
    rows = [(each.document_id, each.query_id, *_cells(each)) for each in comparison.differences]
    return Section(f"{len(rows):,} rows differ", ("document", "query", "A", "B", "gold"), rows)


def difference_lines(comparison: Comparison) -> Iterator[str]:
    """Yield the rows that differ as lines of text."""
    for each in comparison.differences:
        yield printable(f"document '{each.document_id}', query '{each.query_id}'")
        for name, cell in zip(("A", "B", "gold"), _cells(each), strict=True):
            if name != "gold" or each.gold is not None:
                yield printable(f"  {name:4}  {' '.join(cell.split())}")


def _cells(difference: Difference) -> tuple[str, str, str]:
    """Return the two answers or errors, and the gold answers."""
    first = f"({difference.first_error})" if difference.first is None else difference.first
    second = f"({difference.second_error})" if difference.second is None else difference.second
    return first, second, " | ".join(difference.gold or ())


def _judgement(gold: Judgement) -> Section:
    rows = [
        ("right in both", f"{gold.both:,}"),
        ("right in A only", f"{gold.only_first:,}"),
        ("right in B only", f"{gold.only_second:,}"),
        ("right in neither", f"{gold.neither:,}"),
        ("p, McNemar's exact test", f"{gold.p:.4f}"),
        ("F1 of A", str(gold.first_f1)),
        ("F1 of B", str(gold.second_f1)),
        ("F1 of B minus F1 of A", str(gold.f1_difference)),
    ]
    note = "Right: the same as a gold answer after normalisation. Intervals are of 95 %, from resampled documents."
    return Section("Against gold", ("measure", "value"), rows, note)


def _short(text: str | None) -> str:
    text = "–" if text is None else " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
