"""The columns that a job needs of its input files, and the kinds of values that they may hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import InputError, suggestion


@dataclass(frozen=True)
class Kind:
    """A kind of values that a column may hold: in words, and as tests of an Arrow type and of a value."""

    words: str
    fits_type: Callable[[Any], bool]
    fits_value: Callable[[Any], bool]


@dataclass(frozen=True)
class Column:
    """A column that is needed. user: the beginning of messages about it, which says who needs it."""

    name: str
    user: str
    kind: Kind


@dataclass(frozen=True)
class Needs:
    """The settings of a job that a reader needs.

    columns: all columns that are needed. encoding: of files without a byte-order mark; None for UTF-8. section: of the
    job file, whose `encoding` a message may suggest; "" if the files are named elsewhere.
    """

    columns: Sequence[Column] = ()
    encoding: str | None = None
    section: str = "documents"

    @property
    def remedy(self) -> str:
        """The end of a message about bytes that are not text."""
        key = f", or set {self.section}.encoding, for example to cp1252 or utf-16-le" if self.section else ""
        return f"; save it as UTF-8{key}"

    def check_presence(self, file: object, names: Sequence[str]) -> None:
        """Raise InputError if a file whose columns have these names lacks a column, or has it twice."""
        for column in self.columns:
            times = names.count(column.name)
            problem = f"{column.user} the column '{column.name}', which {file}"
            if times == 0:
                raise InputError(f"{problem} lacks{suggestion(column.name, set(names))}")
            if times > 1:
                raise InputError(f"{problem} has {times} times; rename the others")


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # A column that holds only nulls has the type null.
    return any(
        check(kind)
        for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    )


ANYTHING = Kind("anything", lambda _: True, lambda _: True)
TEXT = Kind("text", _is_text, lambda value: isinstance(value, str))
ID = Kind(
    "text or whole numbers",
    lambda kind: bool(pa.types.is_integer(kind)) or _is_text(kind),
    lambda value: isinstance(value, str | int) and not isinstance(value, bool),
)
