"""Rows of Parquet, JSON Lines and text files, checked, and streamed with the columns that are needed.

No more than one row and the page of the file that holds it are in memory. A Parquet page is read as a whole, and
pyarrow writes up to 1,024 rows into one; very long texts need less memory if they were written with
`write_batch_size=16`.

A text file is one row: `id` is its path relative to the folder, and `text` is its content. In JSON Lines, a key that a
line lacks is null; a key that no line of a file has is an error. A value that is not text, though its column is, is
`Unreadable`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, one_line, suggestion
from pipeline.files.encoding import (
    LONGEST_MARK,
    NotText,
    Unreadable,
    decode,
    describe,
    find_encoding,
    split_lines,
    wrong_character,
)
from pipeline.files.find import JSON, PARQUET, TEXT_FILE, InputFile, find_files

# Without a buffer pyarrow reads a whole column chunk at once, however small the batches are.
_BUFFER_BYTES = 1 << 20
_BROKEN = (OSError, ValueError, pa.ArrowException)
_TEXT_COLUMNS = ("id", "text")


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
class Record:
    """One row: the values of its columns, its file, and its number in the file."""

    values: dict[str, Any]
    file: InputFile
    number: int

    def unreadable(self, name: str) -> str | None:
        """Return the place of a value and why it is not text, or None."""
        value = self.values[name]
        reason = value.reason if isinstance(value, Unreadable) else wrong_character(value)
        if reason is None or self.file.format == TEXT_FILE:
            return reason and f"{self.place} {reason}"
        return f"the column '{name}' in {self.place} {reason}"

    @property
    def place(self) -> str:
        """The place of the row, for messages."""
        if self.file.format == TEXT_FILE:
            return str(self.file)
        number = f"line {self.number}" if self.file.format == JSON else f"row {self.number} (from 0)"
        return f"{number} of {self.file}"


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


class Table:
    """The rows of the files that a path, a folder, a glob or a URL names: files sorted by name, rows in their order.

    key: the key of the job file that gives the path, for messages. columns: all columns that are needed. encoding: of
    files without a byte-order mark; None for UTF-8. Raises InputError if there are no files, or files of several
    formats.
    """

    def __init__(self, path: str, key: str, columns: Sequence[Column], encoding: str | None = None) -> None:
        self.files = find_files(path, key)
        self._columns, self._encoding = columns, encoding
        section = key.rpartition(".")[0] or "documents"
        self._remedy = f"; save it as UTF-8, or set {section}.encoding, for example to cp1252 or utf-16-le"

    def check(self) -> None:
        """Raise InputError if a file lacks a column or has it in another type. Of Parquet only the footer is read."""
        for file in self.files:
            if file.format == JSON:
                keys = {key for _, values in self.json_rows(file) for key in values}
                if keys:
                    self._check_presence(file, sorted(keys))
            elif file.format == PARQUET:
                self._check_parquet(file)
            else:
                self._check_presence(file, _TEXT_COLUMNS)

    def records(self, names: Collection[str], rows_per_batch: int) -> Iterator[Record]:
        """Yield the rows with the named columns. A named column that is not needed may be missing, and is then null.

        Raises InputError if a file is damaged.
        """
        for file in self.files:
            for number, values in self._rows(file, names, rows_per_batch):
                yield Record({name: values.get(name) for name in names}, file, number)

    def _rows(
        self, file: InputFile, names: Collection[str], rows_per_batch: int
    ) -> Iterable[tuple[int, dict[str, Any]]]:
        if file.format == JSON:
            return self.json_rows(file)
        if file.format == PARQUET:
            needed = {column.name for column in self._columns}
            return enumerate(_parquet_rows(file, sorted(names), needed, rows_per_batch))
        return [(0, self._read_text(file, names))]

    def _check_parquet(self, file: InputFile) -> None:
        with _open_parquet(file) as parquet:
            schema = parquet.schema_arrow
        self._check_presence(file, schema.names)
        for column in self._columns:
            kind = schema.field(column.name).type
            if not column.kind.fits_type(kind):
                raise InputError(
                    f"{column.user} the column '{column.name}', which in {file} is {kind}; expected {column.kind.words}"
                )

    def _check_presence(self, file: InputFile, names: Sequence[str]) -> None:
        for column in self._columns:
            times = names.count(column.name)
            problem = f"{column.user} the column '{column.name}', which {file}"
            if times == 0:
                raise InputError(f"{problem} lacks{suggestion(column.name, set(names))}")
            if times > 1:
                raise InputError(f"{problem} has {times} times; rename the others")

    def json_rows(self, file: InputFile) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number and the object of each line that is not blank. Raises InputError."""
        try:
            with file.open() as content:
                encoding, offset = find_encoding(content.read(LONGEST_MARK), self._encoding)
                content.seek(offset)
                for number, line in enumerate(split_lines(content, "\n".encode(encoding)), start=1):
                    values = self._parse(line, encoding, offset, f"line {number} of {file}")
                    if values is not None:
                        yield number, values
                    offset += len(line)
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {one_line(error)}") from None

    def _parse(self, line: bytes, encoding: str, offset: int, place: str) -> dict[str, Any] | None:
        """Return the object of a line, or None if the line is blank. offset: bytes of the file before the line."""
        text, undecoded = self._decode_line(line, encoding, offset, place)
        text = text.removeprefix("\ufeff")
        if not text.strip():
            return None
        try:
            values = json.loads(text, strict="\0" not in text)  # one NUL byte costs one row
            if undecoded or "\\u" in text or "\0" in text:
                pairs = values.items() if isinstance(values, dict) else ()
                reasons = {name: reason for name, value in pairs if (reason := wrong_character(value, undecoded))}
                values = values | {name: Unreadable(reason) for name, reason in reasons.items()} if reasons else values
        except (ValueError, RecursionError) as error:
            remedy = f"; it has NUL bytes{self._remedy}" if "\0" in text else ""
            raise InputError(f"{place} is not JSON: {one_line(error)}{remedy}") from None
        if not isinstance(values, dict):
            raise InputError(f'{place} is no JSON object, such as {{"id": "a", "text": "…"}}')
        for column in self._columns:
            value = values.get(column.name)
            if value is not None and not isinstance(value, Unreadable) and not column.kind.fits_value(value):
                shown = json.dumps(value, ensure_ascii=False)
                shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
                raise InputError(
                    f"{column.user} the column '{column.name}', which in {place} is {shown}; "
                    f"expected {column.kind.words}"
                )
        return values

    def _decode_line(self, line: bytes, encoding: str, offset: int, place: str) -> tuple[str, str]:
        """Return a line in which half characters stand for what does not decode, and the reason, or "".

        Raises InputError if nothing can stand for it.
        """
        try:
            return line.decode(encoding), ""
        except UnicodeDecodeError as error:
            reason = describe(error, encoding, offset) + self._remedy
        try:
            return line.decode(
                encoding, "surrogatepass" if encoding.startswith("utf-16") else "surrogateescape"
            ), reason
        except UnicodeError:
            raise InputError(f"{place} {reason}") from None

    def _read_text(self, file: InputFile, names: Collection[str]) -> dict[str, Any]:
        if "text" not in names:
            return {"id": file.id}
        try:
            with file.open() as content:
                return {"id": file.id, "text": decode(content.read(), self._encoding)}
        except NotText as error:
            return {"id": file.id, "text": Unreadable(f"{error}{self._remedy}")}
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {one_line(error)}") from None


def first_rows(path: str, key: str, count: int) -> list[dict[str, Any]]:
    """Return the first rows of the first file that a path names, with only their columns of texts and whole numbers."""
    table = Table(path, key, ())
    file = table.files[0]
    names: Collection[str] = _TEXT_COLUMNS
    if file.format == PARQUET:
        with _open_parquet(file) as parquet:
            names = [field.name for field in parquet.schema_arrow if ID.fits_type(field.type)]
    if file.format != JSON:
        return [_readable(record.values) for record in islice(table.records(names, rows_per_batch=1), count)]
    rows = [_readable(values) for _, values in islice(table.json_rows(file), count)]
    values = {name: [row.get(name) for row in rows] for name in chain.from_iterable(rows)}
    names = [name for name in values if all(value is None or ID.fits_value(value) for value in values[name])]
    return [{name: row.get(name) for name in names} for row in rows]


def _readable(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with reasons in place of texts that cannot be read, which are texts nevertheless."""
    return {name: value.reason if isinstance(value, Unreadable) else value for name, value in values.items()}


@contextmanager
def _open_parquet(file: InputFile) -> Iterator[Any]:
    try:
        with file.open_for_arrow() as source:
            yield pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except _BROKEN as error:
        raise InputError(f"{file}: cannot be read as Parquet: {one_line(error)}") from None


def _parquet_rows(
    file: InputFile, names: Sequence[str], needed: Collection[str], rows_per_batch: int
) -> Iterator[dict[str, Any]]:
    with _open_parquet(file) as parquet:
        columns = [name for name in names if name in needed or parquet.schema_arrow.names.count(name) == 1]
        batches = parquet.iter_batches(rows_per_batch, columns=columns, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                records = [{name: _value(batch.column(name)[i]) for name in columns} for i in range(len(batch))]
            except _BROKEN as error:
                raise InputError(f"{file}: cannot be read: {one_line(error)}") from None
            yield from records


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:  # one row with broken UTF-8 is no reason to fail a job
        return Unreadable(describe(error, "utf-8", 0) + ", counted from the beginning of the value")
