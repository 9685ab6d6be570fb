"""Rows, and how Parquet files of rows are written and read, with at most one row group in memory.

Which files there are, and when they are written, is in results.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import JobError, OutputError, one_line
from pipeline.files.atomic import atomic_file
from pipeline.files.remote import open_remote
from pipeline.inputs.documents import document_digest
from turboquant.io.atomic import may_pass, open_followed

if TYPE_CHECKING:
    from pipeline.models.quotations import Quotation

QUOTATIONS = pa.list_(
    pa.struct(
        {"quote": pa.string(), "start": pa.int64(), "end": pa.int64(), "occurrences": pa.int32(), "page": pa.int32()}
    )
)
SCHEMA = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("answer_json", pa.string()),  # the same text if it is JSON of the query's schema
        pa.field("thinking", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_type", pa.string()),
        pa.field("error", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("context_tokens", pa.int32()),
        pa.field("query_tokens", pa.int32()),
        pa.field("answer_tokens", pa.int32()),
        pa.field("fingerprint", pa.string(), nullable=False),
        # Results that older versions wrote end here.
        pa.field("logprob_mean", pa.float64()),
        pa.field("logprob_min", pa.float64()),
        pa.field("choice_probabilities", pa.map_(pa.string(), pa.float64())),
        pa.field("samples", pa.list_(pa.string())),
        pa.field("agreement", pa.float64()),
        pa.field("evidence", QUOTATIONS),
        pa.field("versions", pa.map_(pa.string(), pa.string())),
    ]
)
_OLDEST_COLUMNS = SCHEMA.names.index("fingerprint") + 1
# For a part: with so few rows, zstd, dictionaries and statistics would double the time to write it.
_PART_FORMAT = {
    "compression": "snappy",
    "write_page_checksum": True,
    "use_dictionary": False,
    "write_statistics": False,
}
BROKEN = (OSError, ValueError, pa.ArrowException)  # raised when a damaged or foreign file is read
_IDS_PER_BATCH = 8192
_DOCUMENTS_PER_GROUP = 1000
_BYTES_PER_GROUP = 8 << 20


@dataclass(frozen=True)
class Row:
    """One answer, one typed error, or a note that the query was skipped since its condition does not hold.

    fingerprint: hexadecimal digest of everything that decided the row.

    logprob_mean, logprob_min: of the answer's tokens, as the model gave them. choice_probabilities: of each choice of
    the query. samples, agreement: all answers of a query with several samples, and the share of the commonest one.
    evidence: quotations; None if the query wants none or there are none. versions: those of `computing_versions` where
    the row was made; None in results of former releases.
    """

    document_id: str
    query_id: str
    status: Literal["ok", "error", "skipped"]
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
    logprob_mean: float | None = None
    logprob_min: float | None = None
    choice_probabilities: Mapping[str, float] | None = None
    samples: Sequence[str] | None = None
    agreement: float | None = None
    evidence: Sequence[Quotation] | None = None
    versions: Mapping[str, str] | None = None

    @property
    def is_cut(self) -> bool:
        """Whether `max_tokens` cut the answer off."""
        return self.finish_reason == "length"

    @property
    def failure(self) -> str:
        """The row's document and query, and the reason why it failed."""
        return f"document '{self.document_id}', query '{self.query_id}': {self.error}"


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Raise OutputError if the block cannot read a file for a reason that may pass: then the file is not to blame."""
    try:
        yield
    except (OSError, MemoryError) as error:
        if not may_pass(error):
            raise
        raise OutputError(
            f"{path}: cannot be read at the moment: {one_line(error)}; nothing of it is thrown away, and when that is "
            "put right the same command goes on"
        ) from error


def read_rows(path: Path) -> list[Row]:
    """Return all rows of a file, which is read whole before it is judged. Raises OutputError or an error of BROKEN."""
    with reading(path):
        with open_followed(path) as file:
            content = file.read()
        with _open(pa.BufferReader(content)) as rows:
            return _to_rows(rows.read(use_threads=False))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a part, whole or not at all. Raises OutputError if the disk refuses."""
    content = pa.BufferOutputStream()
    pq.write_table(to_table(rows, SCHEMA), content, **_PART_FORMAT)
    with atomic_file(path, clear=False) as temporary:  # `Results` clears all parts when it is opened
        temporary.write_bytes(content.getvalue())


def to_table(rows: Sequence[Row], schema: Any) -> Any:
    """Return a table of rows, to be written with PARQUET_OPTIONS."""
    return pa.Table.from_pylist([vars(row) for row in rows], schema=schema)


def row_groups(documents: Iterable[list[Row]]) -> Iterator[list[Row]]:
    """Yield the rows of whole documents, in groups that are small enough for memory."""
    group: list[Row] = []
    count = size = 0
    for rows in documents:
        group += rows
        count += 1
        texts = [text for row in rows for text in (row.answer, row.answer_json, row.thinking, row.error) if text]
        size += sum(map(len, texts)) + 200 * len(rows)
        if count >= _DOCUMENTS_PER_GROUP or size >= _BYTES_PER_GROUP:
            yield group
            group, count, size = [], 0, 0
    if group:
        yield group


class FinishedFile:
    """Reads the rows of a finished file by document, with one row group in memory at a time."""

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

    @property
    def metadata(self) -> dict[str, str]:
        """The facts about the job that were written to the file."""
        entries = self._file.metadata.metadata or {}
        texts = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in entries.items()}
        return {key: text for key, text in texts.items() if key != "ARROW:schema"}

    def rows(self, document_id: str) -> list[Row]:
        """Return a document's rows; an empty list if it has none. Raises an error of BROKEN."""
        if self._first_rows is None:
            first_rows: dict[bytes, int] = {}
            number = 0
            for batch in self._file.iter_batches(_IDS_PER_BATCH, columns=["document_id"], use_threads=False):
                for each in batch.column(0).to_pylist():
                    first_rows.setdefault(document_digest(each), number)
                    number += 1
            self._first_rows = first_rows
        start = self._first_rows.get(document_digest(document_id))
        return [] if start is None else list(self._rows_from(start, document_id))

    def pairs(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each document's id with the ids of its rows' queries, in order. Raises an error of BROKEN."""
        batches = self._file.iter_batches(_IDS_PER_BATCH, columns=["document_id", "query_id"], use_threads=False)
        pairs = (tuple(pair.values()) for batch in batches for pair in batch.to_pylist())
        for document_id, own in groupby(pairs, key=lambda pair: str(pair[0])):
            yield document_id, [query_id for _, query_id in own]

    def _rows_from(self, start: int, document_id: str) -> Iterator[Row]:
        """Yield the document's rows, which follow each other from row ``start`` on."""
        first_group = bisect_right(self._group_starts, start) - 1
        for group in range(first_group, len(self._group_starts) - 1):
            if self._group[0] != group:
                self._group = (group, self._file.read_row_group(group, use_threads=False))
            table = self._group[1]
            ids = table.column("document_id")
            begin = end = max(start - self._group_starts[group], 0)
            while end < len(ids) and ids[end].as_py() == document_id:
                end += 1
            yield from _to_rows(table.slice(begin, end - begin))
            if end < len(ids):
                return


def open_finished(path: Path | str) -> FinishedFile | None:
    """Open the finished file at a path or a URL. Return None if there is no file. Raises JobError for other files."""
    try:
        with reading(path):
            return FinishedFile(path if isinstance(path, Path) else open_remote(path))
    except FileNotFoundError:
        return None
    except BROKEN as error:
        # output.path may name any file by mistake, so the file is neither replaced nor moved.
        raise JobError(
            f"{path}: exists and is not a result that can be continued ({one_line(error)}); "
            "move it away, or set another output.path"
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a finished file. Raises JobError if it is not a result."""
    with _finished_file(path) as file:
        return {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}


def read_documents(path: Path) -> Iterator[list[Row]]:
    """Yield the rows of each document of a finished file, with one row group in memory. Raises JobError."""
    with _finished_file(path) as file:
        for group in range(file.num_row_groups):
            rows = _to_rows(file.read_row_group(group, use_threads=False))
            yield from (list(own) for _, own in groupby(rows, key=lambda row: row.document_id))


@contextmanager
def _finished_file(path: Path) -> Iterator[Any]:
    try:
        with reading(path):
            file = _open(path)
            try:
                yield file
            finally:
                file.close(force=True)
    except BROKEN as error:
        raise JobError(
            f"{path}: is not a result that can be read ({one_line(error)}); move it away, and run it again"
        ) from None


def _open(source: Path | RawIOBase | pa.NativeFile) -> Any:
    """Open a file of rows. The checksums of pages are verified when they are read."""
    opened = open_followed(source) if isinstance(source, Path) else source  # a pipe would be waited for
    try:
        file = pq.ParquetFile(opened, page_checksum_verification=True)
        columns = list(file.schema_arrow.remove_metadata())
        if len(columns) < _OLDEST_COLUMNS or columns != list(SCHEMA)[: len(columns)]:
            raise ValueError("its columns are not those of a result")
    except BaseException:
        opened.close()
        raise
    return file


def _to_rows(table: Any) -> list[Row]:
    return [Row(**record) for record in table.to_pylist(maps_as_pydicts="strict")]
