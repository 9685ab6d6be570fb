"""Write Arrow tables to a file, one after the other; the suffix of its name says in which format.

In CSV, lists and mappings are JSON texts, and a null is an empty cell. JSON has null for a number that is not finite.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.files.result_formats import is_json_lines, is_parquet

PARQUET_OPTIONS = {"compression": "zstd", "write_page_checksum": True}


class TableWriter(Protocol):
    """Writes tables of one schema to a file."""

    def write_table(self, table: Any) -> None:
        """Write a table behind those that were written before."""


@contextmanager
def table_writer(file: Path, name: str, schema: Any) -> Iterator[TableWriter]:
    """Open a file for tables of a schema. name: the path or URL whose suffix says the format. Raises OSError."""
    if is_parquet(name):
        with pq.ParquetWriter(file, schema, **PARQUET_OPTIONS) as parquet:
            yield parquet
    elif is_json_lines(name):
        with file.open("w", encoding="utf-8", newline="\n") as lines:
            yield _JsonLines(lines)
    else:
        flat = pa.schema([pa.field(field.name, pa.string() if _is_nested(field) else field.type) for field in schema])
        with pyarrow.csv.CSVWriter(file, flat, write_options=pyarrow.csv.WriteOptions(quoting_style="needed")) as csv:
            yield _Csv(csv)


class _JsonLines:
    def __init__(self, lines: Any) -> None:
        self._lines = lines

    def write_table(self, table: Any) -> None:
        for row in table.to_pylist(maps_as_pydicts="strict"):
            self._lines.write(f"{_json(row)}\n")


class _Csv:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write_table(self, table: Any) -> None:
        for number, field in enumerate(table.schema):
            if _is_nested(field):
                values = table.column(number).to_pylist(maps_as_pydicts="strict")
                texts = [None if value is None else _json(value) for value in values]
                table = table.set_column(number, field.name, pa.array(texts, pa.string()))
        self._writer.write_table(table)


def _is_nested(field: Any) -> bool:
    return bool(pa.types.is_nested(field.type))


def _json(value: Any) -> str:
    """Return a value as JSON, which has no NaN and no infinity: they are null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_text)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=_as_text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_text(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
