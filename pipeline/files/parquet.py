"""Rows of Parquet files, streamed with the columns that are needed.

No more than `rows_per_batch` rows and the page of the file that holds them are in memory. A Parquet page is read as a
whole, and pyarrow writes up to 1,024 rows into one; very long texts need less memory if they were written with
`write_batch_size=16`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, one_line
from pipeline.files.columns import ID, Needs
from pipeline.files.conversions import what_else
from pipeline.files.encoding import Unreadable, describe
from pipeline.files.formats import Format, InputFile, Rows, beginning

# Without a buffer pyarrow reads a whole column chunk at once, however small the batches are.
_BUFFER_BYTES = 1 << 20
BROKEN = (OSError, ValueError, pa.ArrowException)


class Parquet(Format):
    """Parquet files. Their columns are checked by the footer alone."""

    name = "Parquet"
    suffixes: tuple[str, ...] = (".parquet",)
    magic = b"PAR1"

    def columns(self, file: InputFile, needs: Needs) -> Sequence[str]:
        """Return the names in the footer."""
        with self.opened(file) as parquet:
            names: list[str] = parquet.schema_arrow.names
        return names

    def check(self, file: InputFile, needs: Needs) -> None:
        """Raise InputError if a file lacks a column that is needed, or has it in another type."""
        with self.opened(file) as parquet:
            schema = parquet.schema_arrow
        needs.check_presence(file, schema.names)
        for column in needs.columns:
            kind = schema.field(column.name).type
            if not column.kind.fits_type(kind):
                raise InputError(
                    f"{column.user} the column '{column.name}', which in {file} is {kind}; expected {column.kind.words}"
                )

    def rows(self, file: InputFile, needs: Needs, names: Collection[str] | None, rows_per_batch: int) -> Rows:
        """Return the number and the values of each row. A column that is not needed may be missing."""
        return enumerate(self._rows(file, needs, names, rows_per_batch))

    def place(self, file: InputFile, number: int) -> str:
        """Return the place of a row, for messages."""
        return f"row {number} (from 0) of {file}"

    def _rows(
        self, file: InputFile, needs: Needs, names: Collection[str] | None, rows_per_batch: int
    ) -> Iterator[dict[str, Any]]:
        with self.opened(file) as parquet:
            schema = parquet.schema_arrow
            if names is None:
                names = [field.name for field in schema if ID.fits_type(field.type)]
            needed = {column.name for column in needs.columns}
            columns = [name for name in sorted(names) if name in needed or schema.names.count(name) == 1]
            batches = parquet.iter_batches(rows_per_batch, columns=columns, use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                    if batch is None:
                        return
                    values = {name: batch.column(name) for name in columns}
                    rows = [{name: _value(values[name][i]) for name in columns} for i in range(len(batch))]
                except BROKEN as error:
                    raise InputError(f"{file}: cannot be read: {one_line(error)}") from None
                yield from rows

    @contextmanager
    def opened(self, file: InputFile) -> Iterator[Any]:
        """Open a file, which has a `schema_arrow` and the method `iter_batches`. Raises InputError."""
        try:
            with file.open_for_arrow() as source:
                yield pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except BROKEN as error:
            with suppress(OSError):
                first = beginning(file.path)
                if not first.startswith(Parquet.magic) and (what := what_else(file.path, first)):
                    raise InputError(f"{file}: is not Parquet: it {what}") from None
            raise InputError(f"{file}: cannot be read as Parquet: {one_line(error)}") from None


def _value(scalar: Any) -> Any:
    """Return the value of an Arrow scalar in Python, or `Unreadable` if Python cannot hold it."""
    try:
        return _python_value(scalar)
    except UnicodeDecodeError as error:  # one row with broken UTF-8 is no reason to fail a job
        return Unreadable(describe(error, "utf-8", 0) + ", counted from the beginning of the value")
    except Exception as error:  # pyarrow raises many types, and those of time zones too
        return Unreadable(f"has a value of the type {scalar.type} that Python cannot hold: {one_line(error)}")


def _python_value(scalar: Any) -> Any:
    """Return the value of an Arrow scalar in Python. A time that has nanoseconds, which Python lacks, is a text.

    pyarrow returns a type of pandas for those, but only if pandas is installed.
    """
    kind = scalar.type
    if pa.types.is_nested(kind) and scalar.is_valid:
        if pa.types.is_struct(kind):
            return {field.name: _python_value(scalar[number]) for number, field in enumerate(kind)}
        if pa.types.is_map(kind):
            return [(_python_value(pair["key"]), _python_value(pair["value"])) for pair in scalar.values]
        if hasattr(scalar, "values"):
            return [_python_value(value) for value in scalar.values]
    if getattr(kind, "unit", None) != "ns" or not scalar.is_valid:
        return scalar.as_py()
    if pa.types.is_duration(kind):
        seconds, nanoseconds = divmod(scalar.value, 10**9)
        whole, text = pa.duration("us"), f"{timedelta(seconds=seconds)}.{nanoseconds:09}"
    else:
        whole = pa.timestamp("us", kind.tz) if pa.types.is_timestamp(kind) else pa.time64("us")
        text = scalar.cast(pa.string()).as_py()
    return text if scalar.value % 1000 else pa.scalar(scalar.value // 1000, whole).as_py()
