"""Documents that a program has in memory, written to a file, so that a run that was killed goes on from there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, one_line
from pipeline.files.atomic import atomic_file

_ROWS_PER_BATCH = 1024


def write_documents(documents: object, stem: Path) -> Path:
    """Write documents to Parquet or JSON Lines, and return the path, which is `stem` with a suffix.

    documents: a data frame (pandas, polars), an Arrow table or another object that Arrow reads, whole; or an iterable
    of mappings, which is read one by one. The same documents give the same bytes. Raises InputError and OutputError.
    """
    if hasattr(documents, "__arrow_c_stream__"):
        path = stem.with_name(f"{stem.name}.parquet")
        with atomic_file(path) as temporary:
            _write_frame(documents, temporary)
        return path
    if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Iterable):
        raise InputError(
            f"documents: expected a path, a data frame, an Arrow table or an iterable of mappings, got "
            f"{type(documents).__name__}"
        )
    path = stem.with_name(f"{stem.name}.jsonl")
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for number, document in enumerate(documents):
            if not isinstance(document, Mapping):
                raise InputError(
                    f'documents: number {number} (from 0) is no mapping, such as {{"id": "a", "text": "…"}}'
                )
            file.write(f"{json.dumps(dict(document), default=str)}\n")
    return path


def _write_frame(documents: object, path: Path) -> None:
    try:
        reader = pa.RecordBatchReader.from_stream(documents)
        schema = pa.schema([field.with_type(_plain(field.type)) for field in reader.schema])
        with pq.ParquetWriter(path, schema, write_batch_size=16) as writer:
            for batch in reader:
                table = pa.Table.from_batches([batch]).cast(schema)
                for start in range(0, table.num_rows, _ROWS_PER_BATCH):
                    writer.write_table(table.slice(start, _ROWS_PER_BATCH))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(f"documents: cannot be written as Parquet: {one_line(error)}") from None


def _plain(kind: Any) -> Any:
    """Return the type with which Parquet holds a column; polars has texts of a type that it does not."""
    return pa.large_string() if kind == pa.string_view() else kind
