"""Queries that come from a table: those of every document, and those that each belong to one.

Shared queries are held in memory, as those of a job file are. A document's own are set down in a temporary database
on disk, so that tables of any size join in any order; memory holds one document's queries and the database's cache.

Knows tables and ids; nothing of documents but their ids.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from threading import Lock
from typing import Any

from pydantic import ValidationError

from pipeline.errors import InputError
from pipeline.files.tables import ID, TEXT, Column, Record, Table
from pipeline.files.temporary_database import spill_errors, temporary_database
from pipeline.job.job import Query, QueryTable, check_unique
from pipeline.job.validation_errors import explain

_SETTINGS = ("max_tokens", "temperature", "top_p", "seed", "stop", "json_schema")
_ROWS_PER_BATCH = 256
_TABLES = """
CREATE TABLE queries (document TEXT, id TEXT, query TEXT, PRIMARY KEY (document, id));
CREATE TABLE documents (id TEXT PRIMARY KEY) WITHOUT ROWID;
"""


def read_shared(source: QueryTable) -> tuple[Query, ...]:
    """The queries that are asked of every document. Raises InputError."""
    queries = tuple(_query(record, source) for record in _records(source))
    if not queries:
        raise InputError(f"queries.path: no queries: there are no rows at {source.path}")
    try:
        check_unique(queries)
    except ValueError as error:
        raise InputError(f"{error}, at {source.path}") from None
    return queries


class OwnQueries:
    """Queries that each belong to one document, by that document's id. Raises InputError where one is wrong.

    document_ids: of all documents. documents: how many of them have queries. rows: how many queries they have.
    strangers: how many documents are named that there are not, and the first of them.
    """

    def __init__(self, source: QueryTable, document_ids: Iterable[str]) -> None:
        self._lock = Lock()
        with spill_errors("queries"):
            self._database = temporary_database(self, _TABLES)
            self._fill(source)
            self._database.executemany("INSERT INTO documents VALUES (?)", ((key,) for key in document_ids))
            self._database.execute("COMMIT")
            known = "document IN (SELECT id FROM documents)"
            self.documents, self.rows = self._one(f"count(DISTINCT document), count(*) FROM queries WHERE {known}")
            self.strangers = self._one(f"count(DISTINCT document), min(document) FROM queries WHERE NOT {known}")
        if not self.rows:
            raise InputError(
                f"queries.document_id: no id in the column '{source.document_id}' at {source.path} is a document's"
                + (f"; there is '{self.strangers[1]}'" if self.strangers[0] else ": there are no rows")
            )

    def of(self, document_id: str) -> list[Query]:
        """A document's queries, in the order of their rows; from any thread."""
        with spill_errors("queries"), self._lock:
            found = self._database.execute("SELECT query FROM queries WHERE document = ? ORDER BY rowid", [document_id])
            return [Query.model_validate_json(query) for (query,) in found]

    def ids_of(self, document_id: str) -> list[str]:
        """The ids of a document's queries, in the same order; from any thread."""
        with spill_errors("queries"), self._lock:
            found = self._database.execute("SELECT id FROM queries WHERE document = ? ORDER BY rowid", [document_id])
            return [query_id for (query_id,) in found]

    def one_of_each_id(self) -> list[Query]:
        """The first query of each id, in the order of rows."""
        with spill_errors("queries"), self._lock:
            found = self._database.execute("SELECT query, min(rowid) FROM queries GROUP BY id ORDER BY min(rowid)")
            return [Query.model_validate_json(query) for query, _ in found]

    def schemas(self) -> dict[str, str]:
        """The JSON schemas of queries, each with the id of the first query that has it."""
        what = "json_extract(query, '$.json_schema') AS schema, id, min(rowid) FROM queries"
        with spill_errors("queries"), self._lock:
            found = self._database.execute(f"SELECT {what} WHERE schema NOT NULL GROUP BY schema ORDER BY min(rowid)")
            return {schema: query_id for schema, query_id, _ in found}

    def _fill(self, source: QueryTable) -> None:
        assert source.document_id is not None
        for record in _records(source):
            query, document_id = _query(record, source), _id(record, source.document_id, "document_id")
            row = document_id, query.id, query.model_dump_json(exclude_none=True)
            try:
                self._database.execute("INSERT INTO queries VALUES (?, ?, ?)", row)
            except sqlite3.IntegrityError:
                raise InputError(
                    f"queries.id: the id '{query.id}' is given twice for the document '{document_id}', "
                    f"the second time in {record.place}; a document's queries must have unique ids"
                ) from None

    def _one(self, what: str) -> Any:
        return self._database.execute(f"SELECT {what}").fetchone()


def _records(source: QueryTable) -> Iterator[Record]:
    named = {"id": source.id, "text": source.text, "document_id": source.document_id}
    kinds = {"id": ID, "text": TEXT, "document_id": ID}
    columns = [Column(name, f"queries.{key} names", kinds[key]) for key, name in named.items() if name is not None]
    table = Table(source.path, "queries.path", columns)
    table.check()
    return table.records({column.name for column in columns} | set(_SETTINGS), _ROWS_PER_BATCH)


def _query(record: Record, source: QueryTable) -> Query:
    settings = {name: _whole(value) for name in _SETTINGS if (value := record.values[name]) is not None}
    named = {"id": _id(record, source.id, "id"), "text": record.values[source.text] or ""}
    try:
        return Query.model_validate(named | settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"queries: {explain(first, key)}, in {record.place}") from None


def _id(record: Record, column: str, key: str) -> str:
    value = record.values[column]
    if value is None or value == "":
        raise InputError(f"queries.{key}: the id is empty in {record.place}, column '{column}'")
    return str(value)


def _whole(value: object) -> object:
    """A column of whole numbers with nulls in it is one of floats in pandas."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
