"""Rows of CSV and TSV, streamed: the first line names the columns, every cell is a text, and an empty one is null."""

from __future__ import annotations

import csv
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.errors import InputError, one_line
from pipeline.files.columns import Needs
from pipeline.files.encoding import OpenedText, Unreadable, wrong_character
from pipeline.files.formats import Format, InputFile, Rows

csv.field_size_limit(sys.maxsize)  # the default, 131,072 characters, is less than a contract


class Csv(Format):
    """Files with commas between cells, or with semicolons or tabs if the first line has those alone."""

    name = "CSV"
    suffixes = (".csv", ".tsv")
    may_be_compressed = True

    def columns(self, file: InputFile, needs: Needs) -> Sequence[str]:
        """Return the cells of the first line."""
        with _opened(file, needs) as (reader, _):
            return next(reader, [])

    def rows(self, file: InputFile, needs: Needs, names: Collection[str] | None, rows_per_batch: int) -> Rows:
        """Return the number of the line where a row begins, from 1, and its values. Blank lines are left out."""
        return _rows(file, needs)

    def place(self, file: InputFile, number: int) -> str:
        """Return the place of a row, for messages."""
        return f"line {number} of {file}"


def _rows(file: InputFile, needs: Needs) -> Iterator[tuple[int, dict[str, Any]]]:
    with _opened(file, needs) as (reader, text):
        names: list[str] = next(reader, [])
        text.undecoded(*names)
        line = reader.line_num + 1
        for cells in reader:
            undecoded = text.undecoded(*cells)
            if cells and len(cells) != len(names):
                if undecoded:
                    raise InputError(f"line {line} of {file} {undecoded}{needs.remedy}")
                raise InputError(
                    f"line {line} of {file} has {len(cells)} cells, and the first line has {len(names)}; put a text "
                    "that has a comma, a quote or a line break in quotes"
                )
            if cells:
                yield line, {name: _value(cell, undecoded, needs) for name, cell in zip(names, cells, strict=True)}
            line = reader.line_num + 1


@contextmanager
def _opened(file: InputFile, needs: Needs) -> Iterator[tuple[Any, OpenedText]]:
    try:
        with file.opened_as_text(Csv.name, needs) as (content, encoding, offset):
            first = content.peek(1).partition("\n".encode(encoding))[0].decode(encoding, "replace")
            separator = next((each for each in ",\t;" if each in first), ",")
            with OpenedText(content, encoding, offset) as text:
                yield csv.reader(text, delimiter=separator, strict=True), text
    except csv.Error as error:
        raise InputError(f"{file}: is not CSV: {one_line(error)}") from None


def _value(cell: str, undecoded: str, needs: Needs) -> str | Unreadable | None:
    reason = wrong_character(cell, undecoded)
    return Unreadable(f"{reason}{needs.remedy}") if reason else cell or None
