"""Rows of input files, checked, and streamed with the columns that are needed; and the lists of formats.

No more than `rows_per_batch` rows and the part of the file that holds them are in memory. A value that is not text,
though its column is, is `Unreadable`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from pipeline.files.arrow_files import Arrow
from pipeline.files.columns import ID, Column, Needs
from pipeline.files.csv_tables import Csv
from pipeline.files.encoding import Unreadable, wrong_character
from pipeline.files.find import find_files
from pipeline.files.formats import Format, InputFile
from pipeline.files.formatted_files import FormattedText
from pipeline.files.json_arrays import JsonArray
from pipeline.files.json_lines import JsonLines
from pipeline.files.parquet import Parquet
from pipeline.files.remote import is_url
from pipeline.files.text_files import TextLines, WholeText

_log = logging.getLogger(__name__)
_TABLES: Sequence[Format] = (Parquet(), JsonLines(), Csv(), JsonArray(), Arrow())
DOCUMENTS: Sequence[Format] = (*_TABLES, WholeText(".txt", ".md", ".markdown"), FormattedText())
QUERIES: Sequence[Format] = (*_TABLES, TextLines(), WholeText(".md", ".markdown"))


@dataclass(frozen=True)
class Record:
    """One row: the values of its columns, its file, and its number in the file."""

    values: dict[str, Any]
    file: InputFile
    number: int

    def unreadable(self, name: str) -> str | None:
        """Return the place of a value and why it is not text, or None."""
        value = self.values[name]
        reason = value.reason if isinstance(value, Unreadable) else wrong_character(value)
        return reason and self.file.format.unreadable(self.place, name, reason)

    @property
    def place(self) -> str:
        """The place of the row, for messages."""
        return self.file.format.place(self.file, self.number)


class Table:
    """The rows of the files that a path, a folder, a glob or a URL names: files sorted by name, rows in their order.

    key: the key of the job file that gives the path, for messages. columns: all columns that are needed. formats: those
    that may be read. encoding: of files without a byte-order mark; None for UTF-8. follow_links: as `find_files` has
    it. Raises InputError if there are no files, or files of several formats or of none.
    """

    def __init__(
        self,
        path: str,
        key: str,
        columns: Sequence[Column] = (),
        encoding: str | None = None,
        formats: Sequence[Format] = DOCUMENTS,
        follow_links: bool = True,
    ) -> None:
        found = find_files(path, key, formats, follow_links)
        self.files, self._passed_over = found.files, found.passed_over
        self.needs = Needs(columns, encoding, "" if key.startswith("--") else key.rpartition(".")[0] or "documents")

    def state(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return what tells whether files have changed: their names and, of those here, sizes, inodes and times."""
        states: list[tuple[str, tuple[int, ...]]] = []
        for file in self.files:
            state = None if is_url(file.path) else os.stat(file.path)
            states.append((file.path, () if state is None else (state.st_size, state.st_ino, state.st_mtime_ns)))
        return states

    def check(self) -> None:
        """Raise InputError if a file lacks a column or has it in another type. Tell what is passed over."""
        if self._passed_over:
            _log.info("%s", self._passed_over)
        for file in self.files:
            file.format.check(file, self.needs)

    def columns(self) -> list[str]:
        """Return the names of all columns that any of the files has."""
        names = (file.format.columns(file, self.needs) for file in self.files)
        return list(dict.fromkeys(chain.from_iterable(names)))

    def records(self, names: Collection[str], rows_per_batch: int) -> Iterator[Record]:
        """Yield the rows with the named columns. A named column that is not needed may be missing, and is then null.

        Raises InputError if a file is damaged.
        """
        for file in self.files:
            for number, values in file.format.rows(file, self.needs, names, rows_per_batch):
                yield Record({name: values.get(name) for name in names}, file, number)


def first_rows(path: str, key: str, count: int) -> list[dict[str, Any]]:
    """Return the first rows of the first file that a path names, with only their columns of texts and whole numbers."""
    table = Table(path, key)
    file = table.files[0]
    rows = [values for _, values in islice(file.format.rows(file, table.needs, None, rows_per_batch=1), count)]
    readable = [
        {name: value.reason if isinstance(value, Unreadable) else value for name, value in row.items()} for row in rows
    ]
    names = [
        name
        for name in dict.fromkeys(chain.from_iterable(readable))
        if all(row.get(name) is None or ID.fits_value(row[name]) for row in readable)
    ]
    return [{name: row.get(name) for name in names} for row in readable]
