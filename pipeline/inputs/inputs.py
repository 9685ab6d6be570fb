"""What goes into a run: a job's documents, each with the queries that are asked of it, checked before anything is run.

Knows that documents and queries belong together, and how many rows that makes; how each is read is the others' work.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from pipeline.inputs.batching import groups
from pipeline.inputs.documents import Document, check_documents, document_ids, stream_documents
from pipeline.inputs.prompts import template_columns
from pipeline.inputs.query_table import OwnQueries, read_shared
from pipeline.job.job import Job, Query, QueryTable
from pipeline.job.shards import Shard

_log = logging.getLogger(__name__)


class Inputs:
    """A job's documents and queries, or a shard of them. Raises JobError where something is wrong with them.

    documents: how many there are, without those of which nothing is asked. rows: how many pairs of a document and a
    query.
    """

    def __init__(self, job: Job, shard: Shard | None = None) -> None:
        self._job, self._shard = job, shard
        self._columns = template_columns(job.prompt)
        self.documents = check_documents(job.documents, self._columns)
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
        if shard is not None:  # to be counted, as groups go by the length of texts
            self.documents = self.rows = 0
            for document in self.stream():
                self.documents += 1
                self.rows += len(document.queries)

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
        return self._every() if self._shard is None else chain.from_iterable(self.groups())

    def groups(self, alone: Collection[str] = ()) -> Iterator[list[Document]]:
        """The same in groups that are answered together; documents in ``alone`` share none."""
        return groups(self._every(), self._job.generation.batch_size, alone, self._shard)

    def pairs(self) -> Iterator[tuple[str, list[str]]]:
        """The ids of the documents, in order, each with its queries' ids; reads no texts, unless for a shard."""
        if self._shard is not None:
            yield from ((document.id, [query.id for query in document.queries]) for document in self.stream())
            return
        shared = [query.id for query in self._shared]
        for document_id in document_ids(self._job.documents):
            if query_ids := self._own.ids_of(document_id) if self._own else shared:
                yield document_id, query_ids

    def _every(self) -> Iterator[Document]:
        for document in stream_documents(self._job.documents, self._columns):
            if queries := self._own.of(document.id) if self._own else self._shared:
                yield replace(document, queries=queries)

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
