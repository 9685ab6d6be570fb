"""Rows, and the Parquet files of them: how they are written, and read with no more in memory than a row group.

Knows columns and checksums; nothing of which files there are, or when they are written.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import RawIOBase
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import JobError, one_line
from pipeline.files.atomic import atomic_file
from pipeline.files.remote import open_remote

SCHEMA = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("answer_json", pa.string()),  # the same, where it is JSON of the query's schema
        pa.field("thinking", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("context_tokens", pa.int32()),
        pa.field("query_tokens", pa.int32()),
        pa.field("answer_tokens", pa.int32()),
        pa.field("fingerprint", pa.string(), nullable=False),
    ]
)
FORMAT = {"compression": "zstd", "write_page_checksum": True}
# Of a part: of so few rows zstd, dictionaries and statistics take as long again as all the rest.
_PART_FORMAT = {
    "compression": "snappy",
    "write_page_checksum": True,
    "use_dictionary": False,
    "write_statistics": False,
}
BROKEN = (OSError, ValueError, pa.ArrowException)  # what reading a damaged or foreign file raises
_IDS_PER_BATCH = 8192


@dataclass(frozen=True)
class Row:
    """One answer, or one typed error. `fingerprint` digests, in hex, everything that determined the row."""

    document_id: str
    query_id: str
    status: Literal["ok", "error"]
    fingerprint: str
    answer: str | None = None
    answer_json: str | None = None
    thinking: str | None = None
    error_type: str | None = None
    error: str | None = None
    finish_reason: str | None = None
    context_tokens: int | None = None
    query_tokens: int | None = None
    answer_tokens: int | None = None

    @property
    def failure(self) -> str:
        """Which row it is, and why it failed."""
        return f"document '{self.document_id}', query '{self.query_id}': {self.error}"


def read_rows(path: Path) -> list[Row]:
    """All rows of a file. Raises what is in BROKEN."""
    with _open(path) as file:
        return _to_rows(file.read(use_threads=False))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a part, whole or not at all. Raises OutputError where the disk refuses."""
    content = pa.BufferOutputStream()
    pq.write_table(to_table(rows, SCHEMA), content, **_PART_FORMAT)
    with atomic_file(path, clear=False) as temporary:  # `Results` clears all parts when it is opened
        temporary.write_bytes(content.getvalue())


def to_table(rows: Sequence[Row], schema: Any) -> Any:
    """A table of rows, to be written with FORMAT."""
    return pa.Table.from_pylist([vars(row) for row in rows], schema=schema)


class FinishedFile:
    """A finished file's rows by document, with one row group in memory at a time."""

    def __init__(self, source: Path | RawIOBase) -> None:
        self._file = _open(source)
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._group_starts = list(accumulate(sizes, initial=0))
        self._first_rows: dict[bytes, int] | None = None
        self._group: tuple[int, Any] = (-1, None)

    def close(self) -> None:
        """Close the file."""
        self._file.close(force=True)

    def rows(self, document_id: str) -> list[Row]:
        """A document's rows; none where the file has none. Raises what is in BROKEN."""
        if self._first_rows is None:
            self._first_rows = self._find_first_rows()
        start = self._first_rows.get(document_digest(document_id))
        return [] if start is None else list(self._rows_from(start, document_id))

    def _find_first_rows(self) -> dict[bytes, int]:
        first_rows: dict[bytes, int] = {}
        number = 0
        for batch in self._file.iter_batches(_IDS_PER_BATCH, columns=["document_id"], use_threads=False):
            for document_id in batch.column(0).to_pylist():
                first_rows.setdefault(document_digest(document_id), number)
                number += 1
        return first_rows

    def _rows_from(self, start: int, document_id: str) -> Iterator[Row]:
        """The document's rows, which stand together."""
        first_group = bisect_right(self._group_starts, start) - 1
        for group in range(first_group, len(self._group_starts) - 1):
            table = self._read_group(group)
            ids = table.column("document_id")
            begin = end = max(start - self._group_starts[group], 0)
            while end < len(ids) and ids[end].as_py() == document_id:
                end += 1
            yield from _to_rows(table.slice(begin, end - begin))
            if end < len(ids):
                return

    def _read_group(self, group: int) -> Any:
        if self._group[0] != group:
            self._group = (group, self._file.read_row_group(group, use_threads=False))
        return self._group[1]


def open_finished(path: Path | str) -> FinishedFile | None:
    """The finished file at a path, or at a URL, if there is one. Raises JobError where it is something else."""
    try:
        return FinishedFile(path if isinstance(path, Path) else open_remote(path))
    except FileNotFoundError:
        return None
    except BROKEN as error:
        # It may be anything that output.path names by mistake, so it is neither replaced nor moved.
        raise JobError(
            f"{path}: exists and is not a result that can be continued ({one_line(error)}); "
            "move it away, or set another output.path"
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """What a finished file says of its rows. Raises JobError where it is none."""
    with _finished_file(path) as file:
        return {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}


def read_documents(path: Path) -> Iterator[list[Row]]:
    """A finished file's rows document by document, with one row group in memory. Raises JobError where it is none."""
    with _finished_file(path) as file:
        for group in range(file.num_row_groups):
            rows = _to_rows(file.read_row_group(group, use_threads=False))
            yield from (list(own) for _, own in groupby(rows, key=lambda row: row.document_id))


@contextmanager
def _finished_file(path: Path) -> Iterator[Any]:
    try:
        with _open(path) as file:
            yield file
    except BROKEN as error:
        raise JobError(
            f"{path}: is not a result that can be read ({one_line(error)}); move it away, and run it again"
        ) from None


def document_digest(document_id: str) -> bytes:
    """Stands for an id in 16 bytes."""
    return blake2b(document_id.encode(), digest_size=16).digest()


def _open(source: Path | RawIOBase) -> Any:
    """Open a file of rows; page checksums are verified as it is read."""
    file = pq.ParquetFile(source, page_checksum_verification=True)
    if not file.schema_arrow.equals(SCHEMA, check_metadata=False):
        file.close(force=True)
        raise ValueError("its columns are not those of a result")
    return file


def _to_rows(table: Any) -> list[Row]:
    return [Row(**record) for record in table.to_pylist()]
