"""Documents: checked before a run starts, then streamed one at a time.

A document is a row of a table that `documents.where` selects. No more than one document, and the page of the file that
it is read from (files/tables.py), is in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

from pipeline.errors import InputError, one_line
from pipeline.files.columns import ANYTHING, ID, TEXT, Column
from pipeline.files.encoding import Unreadable
from pipeline.files.tables import Record, Table
from pipeline.inputs.templates import Expression
from pipeline.job.job import Documents, Query

_IDS_PER_BATCH = 8192
_VALUES_PER_BATCH = 16


@dataclass(frozen=True)
class Document:
    """One input row.

    text: "" if the row's text is null or blank. columns: the values of the columns that templates use, by the names
    that the file has. queries: the queries that are asked of it, which inputs.py adds. left_out: the ids of those that
    this run does not answer. unreadable: why a column that the templates use is not text, or "".
    """

    id: str
    text: str
    columns: dict[str, object]
    queries: Sequence[Query] = ()
    unreadable: str = ""
    left_out: frozenset[str] = frozenset()

    @property
    def wanted(self) -> list[Query]:
        """The queries that this run answers. The others still decide where the context ends."""
        return [query for query in self.queries if query.id not in self.left_out]


def check_documents(source: Documents, columns: Collection[str] = ()) -> int:
    """Check files, columns, types and ids before a run starts; return the number of documents.

    columns: the columns that the prompt uses. Of Parquet files only footers, ids and the columns of `where` are read;
    16 bytes of each id are kept. Raises InputError.
    """
    rows = _DocumentRows(source, columns)
    rows.table.check()
    digests: set[bytes] = set()
    for document_id, record in rows.ids():
        digest = document_digest(document_id)
        if digest in digests:
            first = next(other for other_id, other in rows.ids() if other_id == document_id)
            raise InputError(
                f"documents.id: the id '{document_id}' is given twice, in {first.place} and in {record.place}; "
                "ids must be unique"
            )
        digests.add(digest)
    if not digests:
        files = f"{len(rows.table.files)} file{'s' * (len(rows.table.files) > 1)}"
        condition = f" for which documents.where is true: {source.where}" if source.where else ""
        raise InputError(f"documents.path: no documents: {files} at {source.path} with no rows{condition}")
    return len(digests)


def stream_documents(source: Documents, columns: Collection[str] = ()) -> Iterator[Document]:
    """Yield the documents: files sorted by name, rows in the order of the file. Only the named columns are read."""
    names = {source.id, source.text, *columns}
    for record in _DocumentRows(source, columns).selected(names, rows_per_batch=1):
        text = record.values[source.text]
        yield Document(
            id=_id(record, source.id),
            text=text if isinstance(text, str) and text.strip() else "",
            columns={name: record.values[name] for name in sorted(names)},
            unreadable=next(filter(None, map(record.unreadable, [source.text, *sorted(columns)])), ""),
        )


def other_columns(source: Documents) -> list[str]:
    """Return the names of all columns but those of ids and texts."""
    return [name for name in _DocumentRows(source, ()).table.columns() if name not in (source.id, source.text)]


def stream_values(source: Documents, columns: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the id of each document with the values of columns; a value that is not text is None.

    Raises InputError if a file lacks a column.
    """
    rows = _DocumentRows(source, columns, "output.columns names")
    rows.table.check()
    for record in rows.selected({source.id, *columns}, _VALUES_PER_BATCH):
        yield (
            _id(record, source.id),
            {name: None if record.unreadable(name) else record.values[name] for name in columns},
        )


def document_ids(source: Documents) -> Iterator[str]:
    """Yield the ids of the documents in the same order."""
    return (document_id for document_id, _ in _DocumentRows(source, ()).ids())


def document_digest(document_id: str) -> bytes:
    """Return 16 bytes that stand for a document's id."""
    return blake2b(document_id.encode(), digest_size=16).digest()


class _DocumentRows:
    """The rows of a table that are documents."""

    def __init__(self, source: Documents, columns: Collection[str], user: str = "the prompt uses") -> None:
        self._source = source
        self._where = Expression("documents.where", source.where) if source.where else None
        users = dict.fromkeys(self._where.columns, "documents.where uses") if self._where else {}
        users |= dict.fromkeys(columns, user)
        needed = [Column(source.id, "documents.id names", ID), Column(source.text, "documents.text names", TEXT)]
        needed += [Column(name, user, ANYTHING) for name, user in sorted(users.items())]
        self.table = Table(source.path, "documents.path", needed, source.encoding, follow_links=source.follow_links)

    def ids(self) -> Iterator[tuple[str, Record]]:
        """Yield each document's id and row."""
        for record in self.selected({self._source.id}, _IDS_PER_BATCH):
            yield _id(record, self._source.id), record

    def selected(self, names: Collection[str], rows_per_batch: int) -> Iterator[Record]:
        """Yield the first `limit` rows for which `where` is true, with the named columns."""
        if self._where is not None:
            names = {*names, *self._where.columns}
        records = self.table.records(names, rows_per_batch)
        return islice((record for record in records if self._is_selected(record)), self._source.limit)

    def _is_selected(self, record: Record) -> bool:
        if self._where is None:
            return True
        origin = f"documents.where: {self._source.where}: in {record.place}"
        if isinstance(record.values.get(self._source.text), Unreadable) and self._source.text in self._where.columns:
            return True  # it becomes an error row
        for name in self._where.columns:
            if isinstance(record.values[name], Unreadable):
                raise InputError(f"documents.where: {self._source.where}: {record.unreadable(name)}")
        try:
            value = self._where(record.values)
        except Exception as error:
            # A comparison with null, such as null < 3, is false.
            if isinstance(error, TypeError) and any(record.values[name] is None for name in self._where.columns):
                return False
            raise InputError(f"{origin}: {one_line(error)}") from None
        if not isinstance(value, bool | None):
            raise InputError(f"{origin} it is {value!r:.40}; expected a condition that is true or false")
        return bool(value)


def _id(record: Record, column: str) -> str:
    value = record.values[column]
    if value is None or value == "":
        raise InputError(f"documents.id: the id is empty in {record.place}, column '{column}'")
    if isinstance(value, Unreadable):
        raise InputError(f"documents.id: {record.unreadable(column)}")
    return str(value)
