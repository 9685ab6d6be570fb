"""Results in the form that people want them: with columns of the documents, a row for each document, as a batch file.

A run writes `output.path` so, and ``pipeline export`` writes any file. The rows from which a later run goes on are not
touched: they are in the result's own file (`Output.rows_path`).
"""

from __future__ import annotations

import json
import math
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pyarrow as pa

from pipeline.errors import InputError, JobError
from pipeline.files.atomic import output_file
from pipeline.files.remote import is_url, upload
from pipeline.files.result_formats import check_suffix
from pipeline.files.writers import table_writer
from pipeline.inputs.documents import document_digest, document_ids, other_columns, stream_values
from pipeline.job.job import Documents, Job, OutputLayout, Query
from pipeline.output.results import Results
from pipeline.output.rows import QUOTATIONS, SCHEMA, Row, read_metadata, row_groups, to_table

_VALUES_PER_CHECK = 1000
_ID_COLUMN = "document_id"  # of the wide layout
_BATCH = pa.schema(
    {
        "id": pa.string(),
        "custom_id": pa.string(),
        "response": pa.struct(
            {
                "status_code": pa.int32(),
                "request_id": pa.string(),
                "body": pa.struct(
                    {
                        "id": pa.string(),
                        "object": pa.string(),
                        "created": pa.int64(),
                        "model": pa.string(),
                        "choices": pa.list_(
                            pa.struct(
                                {
                                    "index": pa.int32(),
                                    "message": pa.struct({"role": pa.string(), "content": pa.string()}),
                                    "finish_reason": pa.string(),
                                }
                            )
                        ),
                        "usage": pa.struct(
                            dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), pa.int32())
                        ),
                    }
                ),
            }
        ),
        "error": pa.struct({"code": pa.string(), "message": pa.string()}),
    }
)
_Ids = Iterable[tuple[str, Mapping[str, Any]]]


class CarriedColumns:
    """Columns of a job's documents that its result has too.

    wanted: their names, or "all" for all but ids and texts. Raises InputError.
    """

    def __init__(self, source: Documents, wanted: Literal["all"] | Sequence[str]) -> None:
        self._source = source
        self.names = other_columns(source) if wanted == "all" else list(dict.fromkeys(wanted))

    @cached_property
    def fields(self) -> list[Any]:
        """Their names and Arrow types, found by reading all values.

        A column of values that fit no type in common becomes texts: texts stay, other values are written as JSON.
        """
        kinds = dict.fromkeys(self.names, pa.null())
        for values in _batched(self._values()):
            kinds = {name: _common_type(kind, [each[name] for each in values]) for name, kind in kinds.items()}
        return [pa.field(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in kinds.items()]

    def rows(self) -> _Ids:
        """Yield the id and the values of each document, in order."""
        return stream_values(self._source, self.names)

    def arrays(self, values: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the columns of documents. values: of each of them; those of a document that is gone are null."""
        return [_array([each.get(field.name) for each in values], field) for field in self.fields]

    def _values(self) -> Iterator[Mapping[str, Any]]:
        return (values for _, values in self.rows()) if self.names else iter(())


@dataclass(frozen=True)
class _Document:
    """The rows of one document, and the values of the columns that are carried."""

    id: str
    rows: list[Row]
    values: Mapping[str, Any]


class _Layout(ABC):
    """Makes tables of documents. schema: of all of these tables. Raises JobError if two columns have the same name."""

    schema: Any

    def _set_schema(self, fields: Sequence[Any]) -> None:
        _check_names([field.name for field in fields])
        self.schema = pa.schema(fields)

    @abstractmethod
    def table(self, documents: Sequence[_Document]) -> Any:
        """Return the table of some documents."""


class _Long(_Layout):
    """A row for each document and query."""

    def __init__(self, carried: CarriedColumns | None, metadata: Mapping[str, str]) -> None:
        self._carried = carried
        self._set_schema([*SCHEMA, *(carried.fields if carried else ())])
        self.schema = self.schema.with_metadata(metadata)

    def table(self, documents: Sequence[_Document]) -> Any:
        table = to_table([row for document in documents for row in document.rows], SCHEMA)
        columns = []
        if self._carried:
            columns = self._carried.arrays([document.values for document in documents for _ in document.rows])
        return pa.table([*table.columns, *columns], schema=self.schema)


class _Wide(_Layout):
    """A row for each document; for each query its answer, how sure the model was, its error, and perhaps evidence."""

    def __init__(
        self, carried: CarriedColumns | None, metadata: Mapping[str, str], documents: Iterable[_Document]
    ) -> None:
        self._carried = carried
        has_evidence: dict[str, bool] = {}
        for document in documents:
            for row in document.rows:
                has_evidence[row.query_id] = has_evidence.get(row.query_id, False) or bool(row.evidence)
        self._columns: dict[str, list[tuple[Any, Callable[[Row], Any]]]] = {}
        for query_id, wants_evidence in has_evidence.items():
            values = (
                (pa.string(), lambda row: row.answer if row.status == "ok" else None),
                (pa.float64(), confidence),
                (pa.string(), _error),
                (QUOTATIONS, lambda row: row.evidence),
            )
            names = _wide_names(query_id, wants_evidence)
            self._columns[query_id] = [
                (pa.field(name, kind), value) for name, (kind, value) in zip(names, values, strict=False)
            ]
        own = [field for columns in self._columns.values() for field, _ in columns]
        self._set_schema([SCHEMA.field(_ID_COLUMN), *(carried.fields if carried else ()), *own])
        self.schema = self.schema.with_metadata(metadata)

    def table(self, documents: Sequence[_Document]) -> Any:
        arrays = [pa.array([document.id for document in documents], pa.string())]
        if self._carried:
            arrays += self._carried.arrays([document.values for document in documents])
        rows = [{row.query_id: row for row in document.rows} for document in documents]
        for query_id, columns in self._columns.items():
            own = [each.get(query_id) for each in rows]
            arrays += [pa.array([value(row) if row else None for row in own], field.type) for field, value in columns]
        return pa.table(arrays, schema=self.schema)


class _Batch(_Layout):
    """A row for each document and query, in the form of the output of OpenAI's batches.

    The `custom_id` of a row is its query's id, or `DOCUMENT/QUERY` where a query is asked of several documents.
    """

    def __init__(self, metadata: Mapping[str, str], pairs: Iterable[tuple[str, Sequence[str]]]) -> None:
        self._model = metadata.get("pipeline.model", "")
        digests = [document_digest(query_id) for _, query_ids in pairs for query_id in query_ids]
        self._are_unique = len(set(digests)) == len(digests)
        self._set_schema(list(_BATCH))
        self.schema = self.schema.with_metadata(metadata)

    def table(self, documents: Sequence[_Document]) -> Any:
        rows = [self._row(row) for document in documents for row in document.rows]
        return pa.Table.from_pylist(rows, self.schema)

    def _row(self, row: Row) -> dict[str, Any]:
        custom_id = row.query_id if self._are_unique else f"{row.document_id}/{row.query_id}"
        common = {"id": f"batch_req_{row.fingerprint}", "custom_id": custom_id}
        if row.status != "ok":
            message = row.error or "the condition of the query does not hold"
            return common | {"error": {"code": row.error_type or row.status, "message": message}}
        prompt, answer = (row.context_tokens or 0) + (row.query_tokens or 0), row.answer_tokens or 0
        body = {
            "id": f"chatcmpl-{row.fingerprint}",
            "object": "chat.completion",
            "created": 0,  # the bytes of a result do not tell when it was made
            "model": self._model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": row.answer},
                    "finish_reason": row.finish_reason,
                }
            ],
            "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
        }
        return common | {"response": {"status_code": 200, "request_id": row.fingerprint, "body": body}}


def confidence(row: Row) -> float | None:
    """Return how sure the model was of an answer, from 0 to 1, by what the row knows; None if it failed.

    The probability of the choice, or else the share of samples that agree, or else the mean probability of a token.
    """
    if row.status != "ok":
        return None
    if row.choice_probabilities and row.answer is not None:
        return row.choice_probabilities.get(row.answer)
    if row.agreement is not None:
        return row.agreement
    return None if row.logprob_mean is None else math.exp(row.logprob_mean)


class Export:
    """The rows of a result in a layout, with columns of the documents.

    results: open. source: the job's documents, which say the order and give the columns; None for a result file alone,
    whose order stays. Raises JobError.
    """

    def __init__(
        self,
        results: Results,
        source: Documents | None,
        layout: OutputLayout = "long",
        columns: Literal["all"] | Sequence[str] = (),
    ) -> None:
        self._results, self._source = results, source
        if columns and source is None:
            raise JobError("columns of the documents are known by a job file only; name it in place of the result file")
        self._carried = CarriedColumns(source, columns) if columns and source else None
        _check_has_place(layout, columns)
        if layout == "batch":
            self._layout: _Layout = _Batch(results.metadata, results.pairs())
        elif layout == "wide":
            self._layout = _Wide(self._carried, results.metadata, self._documents())
        else:
            self._layout = _Long(self._carried, results.metadata)

    @property
    def schema(self) -> Any:
        """The Arrow schema of all tables."""
        return self._layout.schema

    def tables(self) -> Iterator[Any]:
        """Yield the tables, each of which is small enough for memory."""
        group: list[_Document] = []
        documents = self._documents()

        def rows() -> Iterator[list[Row]]:
            for document in documents:
                group.append(document)
                yield document.rows

        for _ in row_groups(rows()):
            yield self._layout.table(group)
            group.clear()

    def write(self, to: str) -> int:
        """Write the tables to a file or URL, whole or not at all, and return the number of rows. Raises OutputError."""
        try:
            check_suffix(to)
        except ValueError as error:
            raise JobError(f"{to}: {error}") from None
        if is_url(to):
            with TemporaryDirectory() as folder:
                file = Path(folder) / "result"
                count = self._write(file, to)
                upload(file, to)
            return count
        with output_file(Path(to)) as file:
            return self._write(file, to)

    def _write(self, file: Path, name: str) -> int:
        count = 0
        with table_writer(file, name, self.schema) as writer:
            for table in self.tables():
                writer.write_table(table)
                count += table.num_rows
        return count

    def _documents(self) -> Iterator[_Document]:
        """Yield the documents that have rows: those of the job in its order, then the others in that of the result."""
        seen: set[bytes] = set()
        others: _Ids = ((document_id, {}) for document_id, _ in self._results.pairs())
        for document_id, values in chain(self._ids(), others):
            digest = document_digest(document_id)
            if digest in seen:
                continue
            seen.add(digest)
            if rows := list(self._results.rows(document_id).values()):
                yield _Document(document_id, rows, values)

    def _ids(self) -> _Ids:
        if self._carried is not None:
            return self._carried.rows()
        return ((document_id, {}) for document_id in document_ids(self._source)) if self._source else ()


def publish(job: Job, results: Results) -> None:
    """Write a finished result to `output.path`, if that has another form than the rows that later runs keep."""
    if not job.output.is_plain:
        Export(results, job.documents, job.output.layout, job.output.columns).write(job.output.path)


def check_output(job: Job, queries: Iterable[Query]) -> None:
    """Raise JobError if the result cannot have the columns that it shall have, or would replace rows that are kept.

    queries: all of the job, one for each id.
    """
    output = job.output
    if output.is_plain:
        return
    _check_has_place(output.layout, output.columns)
    names = list(SCHEMA.names)
    if output.layout == "wide":
        names = [_ID_COLUMN]
        for query in queries:
            names += _wide_names(query.id, query.settings(job.generation).wants_evidence)
    if output.columns:
        carried = CarriedColumns(job.documents, output.columns)
        next(iter(carried.rows()), None)  # which names a column that is not there
        names += carried.names
    _check_names(names)
    path, rows = Path(output.path), Path(output.rows_path)
    if not is_url(output.path) and not rows.exists() and path.is_file() and _holds_rows(path):
        move = shlex.join(["mv", str(path), str(rows)])
        raise JobError(f"output.path: {path} holds the rows of an earlier run; to go on with them: {move}")


def _check_has_place(layout: OutputLayout, columns: Literal["all"] | Sequence[str]) -> None:
    if layout == "batch" and columns:
        raise JobError("layout batch has no place for columns of the documents; leave them out")


def _wide_names(query_id: str, has_evidence: bool) -> list[str]:
    """Return the names of the columns that a query has in the wide layout."""
    return [query_id, *(f"{query_id}_{each}" for each in ("confidence", "error", *["evidence"] * has_evidence))]


def _check_names(names: Sequence[str]) -> None:
    if twice := next((name for name, times in Counter(names).items() if times > 1), None):
        raise JobError(f"two columns of the result would be called '{twice}'; rename one, or leave it out")


def _holds_rows(path: Path) -> bool:
    with suppress(JobError):
        return "pipeline.job" in read_metadata(path)
    return False


def _error(row: Row) -> str | None:
    if row.status == "error":
        return f"{row.error_type}: {row.error}"
    return None if row.status == "ok" else row.status


def _batched(values: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    batch: list[Mapping[str, Any]] = []
    for each in values:
        batch.append(each)
        if len(batch) == _VALUES_PER_CHECK:
            yield batch
            batch = []
    if batch:
        yield batch


def _common_type(kind: Any, values: Sequence[Any]) -> Any:
    """Return the Arrow type that has the values of a type and these values; text if there is none."""
    if pa.types.is_string(kind) and any(not isinstance(value, str | None) for value in values):
        return kind
    try:
        # Not `pa.infer_type`, which says int64 of [1, "a"].
        schemas = [pa.schema([("", each)]) for each in (kind, pa.array(values).type)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return pa.string()


def _array(values: Sequence[Any], field: Any) -> Any:
    if pa.types.is_string(field.type):
        values = [
            value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False, default=str)
            for value in values
        ]
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"output.columns: the values of '{field.name}' changed meanwhile: {error}") from None
