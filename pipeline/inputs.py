"""What goes into a run: a job's documents, each with the queries that are asked of it, checked before anything is run.

Knows that documents and queries belong together, and how many rows that makes; how each is read is the others' work.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipeline.documents import Document, check_documents, document_ids, stream_documents
from pipeline.job import Job, Query, QueryTable
from pipeline.prompts import template_columns
from pipeline.queries import OwnQueries, read_shared

_log = logging.getLogger(__name__)


class Inputs:
    """A job's documents and queries. Raises JobError where something is wrong with them.

    documents: how many there are, without those of which nothing is asked. rows: how many pairs of a document and a
    query.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._columns = template_columns(job.prompt)
        self.documents = check_documents(job.documents, self._columns).count
        self._own: OwnQueries | None = None
        self._shared: tuple[Query, ...] = ()
        if not isinstance(job.queries, QueryTable):
            self._shared = job.queries
        elif job.queries.document_id is None:
            self._shared = read_shared(job.queries)
        else:
            self._own = self._read_own(job.queries)
            self.documents = self._own.documents
        self.rows = self._own.rows if self._own else self.documents * len(self._shared)

    @property
    def queries(self) -> Sequence[Query]:
        """All queries, those of one id once: as that document has it whose own comes first."""
        return self._own.one_of_each_id() if self._own else self._shared

    @property
    def schemas(self) -> dict[str, str]:
        """The JSON schemas that answers must follow, each with the id of the first query that has it."""
        if self._own:
            return self._own.schemas()
        return {query.json_schema: query.id for query in reversed(self._shared) if query.json_schema}

    def stream(self) -> Iterator[Document]:
        """The documents in order, each with its queries."""
        for document in stream_documents(self._job.documents, self._columns):
            if queries := self._own.of(document.id) if self._own else self._shared:
                yield replace(document, queries=queries)

    def pairs(self) -> Iterator[tuple[str, list[str]]]:
        """The ids of the documents, in order, each with its queries' ids; reads no texts."""
        shared = [query.id for query in self._shared]
        for document_id in document_ids(self._job.documents):
            if query_ids := self._own.ids_of(document_id) if self._own else shared:
                yield document_id, query_ids

    def _read_own(self, source: QueryTable) -> OwnQueries:
        own = OwnQueries(source, document_ids(self._job.documents))
        count, first = own.strangers
        if count:
            _log.warning(
                "queries.document_id: '%s'%s no document's id, so what is asked there is left out",
                first,
                f" and {count - 1:,} more are" if count > 1 else " is",
            )
        if without := self.documents - own.documents:
            _log.warning("queries.document_id: %d of %d documents have no queries", without, self.documents)
        return own
