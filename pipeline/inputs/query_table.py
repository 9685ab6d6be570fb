"""Queries from a table: either all of them are asked of every document, or each belongs to one document.

Shared queries are held in memory, as those of a job file are. Queries that belong to documents are written to a
temporary database on disk, so that tables of any size are joined in any order: memory holds the queries of one document
and the database's cache.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from threading import Lock
from typing import Any

from pydantic import ValidationError

from pipeline.errors import InputError
from pipeline.files.columns import ID, TEXT, Column
from pipeline.files.csv_tables import Csv
from pipeline.files.tables import QUERIES, Record, Table
from pipeline.files.temporary_database import spill_errors, temporary_database
from pipeline.files.text_files import TextLines
from pipeline.inputs.questions import is_chained, unfilled_place
from pipeline.job.job import Query, QueryTable, check_unique, id_of
from pipeline.job.validation_errors import explain

_SETTINGS = (
    *("max_tokens", "temperature", "top_p", "seed", "stop", "json_schema", "choices", "evidence", "samples"),
    *("template", "when", "previous", "check", "retries"),
)
_ROWS_PER_BATCH = 256
_TABLES = """
CREATE TABLE queries (document TEXT, id TEXT, query TEXT, PRIMARY KEY (document, id));
CREATE TABLE documents (id TEXT PRIMARY KEY) WITHOUT ROWID;
"""


def read_shared_queries(source: QueryTable) -> tuple[Query, ...]:
    """Read the queries that are asked of every document. Raises InputError."""
    queries = tuple(_query(record, source) for record in _records(source))
    if not queries:
        raise InputError(f"queries.path: no queries: there are no rows at {source.path}")
    try:
        check_unique(queries)
    except ValueError as error:
        raise InputError(f"{error}, at {source.path}") from None
    return queries


def table_state(source: QueryTable) -> list[tuple[str, tuple[int, ...]]]:
    """Return what tells whether the files of a table of queries have changed."""
    return Table(source.path, "queries.path", formats=QUERIES).state()


class DocumentQueries:
    """Queries that each belong to one document, by that document's id. Raises InputError if one of them is wrong.

    document_ids: the ids of all documents. documents: how many of them have queries. rows: how many queries they have.
    unknown_documents: how many ids in the table belong to no document, and the first of these ids. with_braces,
    first_with_braces: how many queries have the braces of a template in their text and are none, and the first of them.
    have_chains: whether any query may use columns or other answers. have_checks: whether any has a check, which may use
    columns too.

    All methods may be called from any thread.
    """

    def __init__(self, source: QueryTable, document_ids: Iterable[str]) -> None:
        self._lock = Lock()
        self.with_braces = 0
        self.have_chains = self.have_checks = False
        self.first_with_braces: Query | None = None
        with spill_errors("queries"):
            self._database = temporary_database(self, _TABLES)
            self._insert_queries(source)
            self._database.executemany("INSERT INTO documents VALUES (?)", ((key,) for key in document_ids))
            self._database.execute("COMMIT")
            known = "queries WHERE document IN (SELECT id FROM documents)"
            unknown = "queries WHERE document NOT IN (SELECT id FROM documents)"
            ((self.documents, self.rows),) = self._select(f"count(DISTINCT document), count(*) FROM {known}")
            (self.unknown_documents,) = self._select(f"count(DISTINCT document), min(document) FROM {unknown}")
        if not self.rows:
            raise InputError(
                f"queries.document_id: no id in the column '{source.document_id}' at {source.path} is a document's"
                + (f"; there is '{self.unknown_documents[1]}'" if self.unknown_documents[0] else ": there are no rows")
            )

    def queries_of(self, document_id: str) -> list[Query]:
        """Return a document's queries, in the order of their rows."""
        rows = self._select("query FROM queries WHERE document = ? ORDER BY rowid", document_id)
        return [Query.model_validate_json(query) for (query,) in rows]

    def ids_of(self, document_id: str) -> list[str]:
        """Return the ids of a document's queries, in the same order."""
        return [
            query_id for (query_id,) in self._select("id FROM queries WHERE document = ? ORDER BY rowid", document_id)
        ]

    def first_of_each_id(self) -> list[Query]:
        """Return the first query of each id, in the order of rows."""
        rows = self._select("query, min(rowid) FROM queries GROUP BY id ORDER BY min(rowid)")
        return [Query.model_validate_json(query) for query, _ in rows]

    def first_of_each_kind(self) -> list[Query]:
        """Return the first query of each combination of settings, in the order of rows."""
        rows = self._select(
            "query, min(rowid) FROM queries GROUP BY json_remove(query, '$.id', '$.text') ORDER BY min(rowid)"
        )
        return [Query.model_validate_json(query) for query, _ in rows]

    def _select(self, selection: str, *parameters: str) -> list[Any]:
        with spill_errors("queries"), self._lock:
            return self._database.execute(f"SELECT {selection}", parameters).fetchall()

    def _insert_queries(self, source: QueryTable) -> None:
        assert source.document_id is not None
        for record in _records(source):
            query, document_id = _query(record, source), _id(record, source.document_id, "document_id")
            self.have_chains |= is_chained(query)
            self.have_checks |= query.check is not None
            if unfilled_place(query):
                self.with_braces, self.first_with_braces = self.with_braces + 1, self.first_with_braces or query
            row = document_id, query.id, query.model_dump_json(exclude_none=True)
            try:
                self._database.execute("INSERT INTO queries VALUES (?, ?, ?)", row)
            except sqlite3.IntegrityError:
                raise InputError(
                    f"queries.id: the id '{query.id}' is given twice for the document '{document_id}', "
                    f"the second time in {record.place}; a document's queries must have unique ids"
                ) from None


def _records(source: QueryTable) -> Iterator[Record]:
    """Yield the rows of the table, after its columns were checked."""
    names = {"id": source.id, "text": source.text, "document_id": source.document_id}
    kinds = {"id": ID, "text": TEXT, "document_id": ID}
    columns = [Column(name, f"queries.{key} names", kinds[key]) for key, name in names.items() if name is not None]
    table = Table(source.path, "queries.path", columns, source.encoding, QUERIES)
    table.check()
    return table.records({column.name for column in columns} | set(_SETTINGS), _ROWS_PER_BATCH)


def _query(record: Record, source: QueryTable) -> Query:
    for column in (source.id, source.text, *_SETTINGS):
        if reason := record.unreadable(column):
            raise InputError(f"queries: {reason}")
    text = record.values[source.text] or ""
    is_line = isinstance(record.file.format, TextLines)
    values = {"id": id_of(text) if is_line else _id(record, source.id, "id"), "text": text}
    for name in _SETTINGS:
        value = record.values[name]
        if isinstance(record.file.format, Csv) and name != "json_schema":
            value = _cell(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # pandas writes a column of whole numbers and nulls as floats
        if value is not None:
            values[name] = value
    try:
        return Query.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"queries: {explain(first, key)}, in {record.place}") from None


def _cell(value: Any) -> Any:
    """Return the value of a setting in a CSV file: a number or a list if it is written as JSON, or else the text."""
    try:
        return json.loads(value) if value else None
    except ValueError:
        return value


def _id(record: Record, column: str, key: str) -> str:
    value = record.values[column]
    if value is None or value == "":
        raise InputError(f"queries.{key}: the id is empty in {record.place}, column '{column}'")
    if reason := record.unreadable(column):
        raise InputError(f"queries.{key}: {reason}")
    return str(value)
