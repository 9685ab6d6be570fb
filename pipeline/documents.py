"""Documents from Parquet: checked once before anything is run, then streamed one at a time.

It knows files, columns and ids. It does not know templates, queries or tokens, and it never holds more than
one document and the page it stands in. A Parquet page is read whole, and pyarrow's writer puts up to 1,024
rows in one, so very long documents stream in less memory if they were written with `write_batch_size=16`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DocumentsError, one_line, suggestion
from pipeline.job import Documents

# Without a buffer pyarrow reads a whole column chunk at once, however small the batches are.
_BUFFER_BYTES = 1 << 20
_IDS_PER_BATCH = 8192
_BROKEN = (OSError, ValueError, pa.ArrowException)


@dataclass(frozen=True)
class Document:
    """One input row. `text` is "" where the row's is null; `columns` holds what templates may use."""

    index: int
    id: str
    text: str
    columns: dict[str, object]


@dataclass(frozen=True)
class DocumentsSummary:
    """What a check found."""

    count: int
    files: tuple[Path, ...]


def check_documents(source: Documents, columns: Collection[str] = ()) -> DocumentsSummary:
    """Check files, columns, types and ids before anything is run; `columns` are those that the prompt uses.

    Reads only footers and the id column, and keeps 16 bytes of each id. Raises DocumentsError.
    """
    files = _find_files(source.path)
    for file in files:
        _check_columns(file, source, columns)
    seen: set[bytes] = set()
    for file, row, document_id in _ids(files, source.id):
        digest = blake2b(document_id.encode(), digest_size=16).digest()
        if digest in seen:
            raise DocumentsError(_duplicate(files, source.id, document_id, file, row))
        seen.add(digest)
    if not seen:
        raise DocumentsError(f"documents.path: no documents: {_count(files)} at {source.path} with no rows")
    return DocumentsSummary(len(seen), tuple(files))


def stream_documents(source: Documents, columns: Collection[str] = ()) -> Iterator[Document]:
    """Yield the documents in order: files by name, rows as they stand. Reads the named columns only."""
    wanted = sorted({source.id, source.text, *columns})
    index = 0
    for file in _find_files(source.path):
        for row, record in enumerate(_records(file, wanted, rows_per_batch=1)):
            yield Document(
                index=index,
                id=_id(record[source.id], file, row, source.id),
                text=_text(record[source.text]),
                columns={name: record[name] for name in wanted},
            )
            index += 1


def document_ids(source: Documents) -> Iterator[str]:
    """The documents' ids alone, in order; their texts are not read."""
    return (document_id for _, _, document_id in _ids(_find_files(source.path), source.id))


def first_rows(path: str, count: int) -> list[dict[str, Any]]:
    """The first rows of the first file that a path names, with their columns of text and whole numbers alone."""
    file = _find_files(path)[0]
    with _open(file) as parquet:
        columns = [field.name for field in parquet.schema_arrow if _is_id(field.type)]
    return list(islice(_records(file, columns, rows_per_batch=1), count))


def _text(value: object) -> str:
    return value if isinstance(value, str) and value.strip() else ""


def _id(value: object, file: Path, row: int, column: str) -> str:
    if value is None or value == "":
        raise DocumentsError(f"{file}: the id is empty in row {row} (from 0) of column '{column}'")
    return str(value)


def _find_files(path: str) -> list[Path]:
    """The Parquet files that a path, a folder or a glob names, in the order in which they are read."""
    if "://" in path:
        raise DocumentsError(f"documents.path: URLs cannot be read yet: {path}; copy the files here first")
    if os.path.isfile(path):
        return [Path(path)]
    is_folder = os.path.isdir(path)
    pattern = os.path.join(glob.escape(path), "*.parquet") if is_folder else path
    # Without recursion and hidden files, which are other programs' temporary files; ordered by name.
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]
    if files:
        return files
    if is_folder:
        raise DocumentsError(f"documents.path: the folder {path} holds no file named *.parquet")
    if glob.has_magic(path):
        raise DocumentsError(f"documents.path: no file matches {path}")
    beside = [file.name for file in Path(path).parent.glob("*.parquet")]
    raise DocumentsError(f"documents.path: {path} does not exist{suggestion(os.path.basename(path), beside)}")


def _count(files: Collection[Path]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"


def _open(file: Path) -> Any:
    try:
        return pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except _BROKEN as error:
        raise DocumentsError(f"{file}: cannot be read as Parquet: {one_line(error)}") from None


def _check_columns(file: Path, source: Documents, columns: Collection[str]) -> None:
    with _open(file) as parquet:
        schema = parquet.schema_arrow
    _check_column(file, schema, source.id, "documents.id names", _is_id, "text or whole numbers")
    _check_column(file, schema, source.text, "documents.text names", _is_text, "text")
    for column in sorted(columns):
        _check_column(file, schema, column, "the prompt uses", lambda _: True, "")


def _check_column(file: Path, schema: Any, column: str, user: str, fits: Any, expected: str) -> None:
    times = schema.names.count(column)
    if times == 0:
        raise DocumentsError(f"{user} the column '{column}', which {file} lacks{suggestion(column, set(schema.names))}")
    if times > 1:
        raise DocumentsError(f"{user} the column '{column}', which {file} has {times} times; rename the others")
    kind = schema.field(column).type
    if not fits(kind):
        raise DocumentsError(f"{user} the column '{column}', which in {file} is {kind}; expected {expected}")


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # A column of nulls alone has the type null.
    return any(
        check(kind)
        for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    )


def _is_id(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind)) or _is_text(kind)


def _ids(files: Collection[Path], column: str) -> Iterator[tuple[Path, int, str]]:
    """Every document's file, row and id."""
    for file in files:
        for row, record in enumerate(_records(file, [column], _IDS_PER_BATCH)):
            yield file, row, _id(record[column], file, row, column)


def _duplicate(files: Collection[Path], column: str, document_id: str, file: Path, row: int) -> str:
    first = next((f, r) for f, r, other in _ids(files, column) if other == document_id)
    return (
        f"documents.id: the id '{document_id}' is given twice, in row {first[1]} (from 0) of {first[0]} "
        f"and in row {row} of {file}; ids must be unique"
    )


def _records(file: Path, columns: list[str], rows_per_batch: int) -> Iterator[dict[str, Any]]:
    """A file's rows, with the named columns only."""
    with _open(file) as parquet:
        batches = parquet.iter_batches(rows_per_batch, columns=columns, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                records = [{name: _value(batch.column(name)[i]) for name in columns} for i in range(len(batch))]
            except _BROKEN as error:
                raise DocumentsError(f"{file}: cannot be read: {one_line(error)}") from None
            yield from records


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        # One row of broken UTF-8 is no reason to fail a job.
        return scalar.as_buffer().to_pybytes().decode("utf-8", errors="replace")
