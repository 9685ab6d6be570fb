"""Documents: checked once before anything is run, then streamed one at a time.

It knows which rows of a table are documents, and their ids. It does not know files, templates or tokens, and it
never holds more than one document and what reading it takes (tables.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

from pipeline.errors import InputError, one_line
from pipeline.files.tables import ANYTHING, ID, TEXT, Column, Record, Table
from pipeline.inputs.templates import Expression
from pipeline.job.job import Documents, Query

_IDS_PER_BATCH = 8192


@dataclass(frozen=True)
class Document:
    """One input row. `text` is "" where the row's is null; `columns` holds what templates may use.

    queries: what is asked of it, which inputs.py adds.
    """

    id: str
    text: str
    columns: dict[str, object]
    queries: Sequence[Query] = ()


def check_documents(source: Documents, columns: Collection[str] = ()) -> int:
    """Check files, columns, types and ids before anything is run; `columns` are those that the prompt uses.

    Of Parquet it reads only footers, ids and what `where` uses; it keeps 16 bytes of each id. Raises InputError.
    """
    rows = _Rows(source, columns)
    rows.table.check()
    seen: set[bytes] = set()
    for document_id, record in rows.ids():
        digest = blake2b(document_id.encode(), digest_size=16).digest()
        if digest in seen:
            raise InputError(_duplicate(rows, document_id, record))
        seen.add(digest)
    if not seen:
        files = f"{len(rows.table.files)} file{'s' * (len(rows.table.files) > 1)}"
        fitting = f" that documents.where is true of: {source.where}" if source.where else ""
        raise InputError(f"documents.path: no documents: {files} at {source.path} with no rows{fitting}")
    return len(seen)


def stream_documents(source: Documents, columns: Collection[str] = ()) -> Iterator[Document]:
    """Yield the documents in order: files by name, rows as they stand. Reads the named columns only."""
    wanted = {source.id, source.text, *columns}
    for record in _Rows(source, columns).selected(wanted, rows_per_batch=1):
        yield Document(
            id=_id(record, source.id),
            text=_text(record.values[source.text]),
            columns={name: record.values[name] for name in sorted(wanted)},
        )


def document_ids(source: Documents) -> Iterator[str]:
    """The ids of the documents, in order."""
    return (document_id for document_id, _ in _Rows(source, ()).ids())


class _Rows:
    """The rows of a table that are documents."""

    def __init__(self, source: Documents, columns: Collection[str]) -> None:
        self._source = source
        self._where = Expression("documents.where", source.where) if source.where else None
        used = dict.fromkeys(self._where.columns, "documents.where uses") if self._where else {}
        used |= dict.fromkeys(columns, "the prompt uses")
        needed = [Column(source.id, "documents.id names", ID), Column(source.text, "documents.text names", TEXT)]
        needed += [Column(name, user, ANYTHING) for name, user in sorted(used.items())]
        self.table = Table(source.path, "documents.path", needed)

    def ids(self) -> Iterator[tuple[str, Record]]:
        """Every document's id and row."""
        for record in self.selected({self._source.id}, _IDS_PER_BATCH):
            yield _id(record, self._source.id), record

    def selected(self, wanted: Collection[str], rows_per_batch: int) -> Iterator[Record]:
        """The first ``limit`` rows that ``where`` is true of."""
        names = {*wanted, *self._where.columns} if self._where else wanted
        records = self.table.records(names, rows_per_batch)
        return islice((record for record in records if self._is_selected(record)), self._source.limit)

    def _is_selected(self, record: Record) -> bool:
        if self._where is None:
            return True
        told = f"documents.where: {self._source.where}: in {record.place}"
        try:
            found = self._where(record.values)
        except Exception as error:
            # What can't be said of a null, as that it is less than something, is not true of it.
            if isinstance(error, TypeError) and any(record.values[name] is None for name in self._where.columns):
                return False
            raise InputError(f"{told}: {one_line(error)}") from None
        if not isinstance(found, bool | None):
            raise InputError(f"{told} it is {found!r:.40}; expected a condition that is true or false")
        return bool(found)


def _text(value: object) -> str:
    return value if isinstance(value, str) and value.strip() else ""


def _id(record: Record, column: str) -> str:
    value = record.values[column]
    if value is None or value == "":
        raise InputError(f"documents.id: the id is empty in {record.place}, column '{column}'")
    return str(value)


def _duplicate(rows: _Rows, document_id: str, record: Record) -> str:
    first = next(other for known, other in rows.ids() if known == document_id)
    return (
        f"documents.id: the id '{document_id}' is given twice, in {first.place} and in {record.place}; "
        "ids must be unique"
    )
