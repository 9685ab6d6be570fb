"""The inputs of a run: a job's documents, each with the queries that are asked of it, checked before the run starts."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from pipeline.inputs.batching import group_documents
from pipeline.inputs.documents import Document, check_documents, document_ids, stream_documents
from pipeline.inputs.prompts import check_context_has_text, template_columns
from pipeline.inputs.query_table import DocumentQueries, read_shared_queries
from pipeline.job.job import Job, Query, QueryTable
from pipeline.job.shards import Shard

_log = logging.getLogger(__name__)


class Inputs:
    """A job's documents and queries, or those of one shard. Raises JobError if something is wrong with them.

    documents: the number of documents that have queries. rows: the number of pairs of a document and a query.
    """

    def __init__(self, job: Job, shard: Shard | None = None) -> None:
        self._job, self._shard = job, shard
        self._columns = template_columns(job.prompt, job.documents)
        self.documents = check_documents(job.documents, self._columns)
        check_context_has_text(job.prompt, job.documents)
        self._document_queries: DocumentQueries | None = None
        self._shared_queries: tuple[Query, ...] = ()
        if not isinstance(job.queries, QueryTable):
            self._shared_queries = job.queries
        elif job.queries.document_id is None:
            self._shared_queries = read_shared_queries(job.queries)
        else:
            self._document_queries = self._read_document_queries(job.queries)
            self.documents = self._document_queries.documents
        self.rows = (
            self._document_queries.rows if self._document_queries else self.documents * len(self._shared_queries)
        )
        if shard is not None:  # the documents must be read, because groups depend on the length of texts
            self.documents = self.rows = 0
            for document in self.stream():
                self.documents += 1
                self.rows += len(document.queries)

    @property
    def queries(self) -> Sequence[Query]:
        """All queries, one for each id: of queries that belong to documents, the first one with that id."""
        return self._document_queries.first_of_each_id() if self._document_queries else self._shared_queries

    @property
    def schemas(self) -> dict[str, str]:
        """The JSON schemas that answers must follow, each with the id of the first query that has it."""
        if self._document_queries:
            return self._document_queries.schemas()
        return {query.json_schema: query.id for query in reversed(self._shared_queries) if query.json_schema}

    def stream(self) -> Iterator[Document]:
        """Yield the documents in order, each with its queries."""
        return self._all_documents() if self._shard is None else chain.from_iterable(self.groups())

    def groups(self, alone: Collection[str] = ()) -> Iterator[list[Document]]:
        """Yield the same documents in groups that are answered together; documents in `alone` share no batch."""
        return group_documents(self._all_documents(), self._job.generation.batch_size, alone, self._shard)

    def pairs(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each document's id with the ids of its queries, in order. Texts are read only for a shard."""
        if self._shard is not None:
            yield from ((document.id, [query.id for query in document.queries]) for document in self.stream())
            return
        shared = [query.id for query in self._shared_queries]
        for document_id in document_ids(self._job.documents):
            query_ids = self._document_queries.ids_of(document_id) if self._document_queries else shared
            if query_ids:
                yield document_id, query_ids

    def _all_documents(self) -> Iterator[Document]:
        """Yield the documents of all shards that have queries."""
        for document in stream_documents(self._job.documents, self._columns):
            queries = self._document_queries.queries_of(document.id) if self._document_queries else self._shared_queries
            if queries:
                yield replace(document, queries=queries)

    def _read_document_queries(self, source: QueryTable) -> DocumentQueries:
        queries = DocumentQueries(source, document_ids(self._job.documents))
        count, first = queries.unknown_documents
        if count:
            _log.warning(
                "queries.document_id: '%s'%s no document's id, so its queries are left out",
                first,
                f" and {count - 1:,} more are" if count > 1 else " is",
            )
        if without := self.documents - queries.documents:
            _log.warning("queries.document_id: %d of %d documents have no queries", without, self.documents)
        return queries
