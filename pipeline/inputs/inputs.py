"""The inputs of a run: a job's documents, each with the queries that are asked of it, checked before the run starts."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from pipeline.errors import JobError, suggestion
from pipeline.inputs.batching import group_documents
from pipeline.inputs.documents import Document, check_documents, document_digest, document_ids, stream_documents
from pipeline.inputs.prompts import check_context_has_text, template_columns
from pipeline.inputs.query_table import DocumentQueries, read_shared_queries, table_state
from pipeline.inputs.questions import chain_of, question_columns, unfilled_place
from pipeline.job.job import Job, Query, QueryTable
from pipeline.job.selection import Selection, matches
from pipeline.job.shards import Shard

_log = logging.getLogger(__name__)


class Inputs:
    """A job's documents and queries, or those of one shard. Raises JobError if something is wrong with them.

    selection: the part of the job that is wanted; JobError is raised if it names what the job does not have.
    takes_along: wanted queries take those along whose answers they use.
    documents: the number of wanted documents that have queries. rows: the number of wanted pairs of document and query.
    is_part: whether the job has other pairs. shared_queries: the job's queries, unless each belongs to a document.
    stages: how many groups of queries are asked one behind the other, because they use each other's answers.
    """

    def __init__(
        self,
        job: Job,
        shard: Shard | None = None,
        selection: Selection | None = None,
        takes_along: bool = True,
    ) -> None:
        self._job, self._shard, self._selection = job, shard, selection or Selection()
        self._columns = template_columns(job.prompt, job.documents)
        if not isinstance(job.queries, QueryTable):
            self._columns |= question_columns(job.queries, job.documents)
        self.documents = check_documents(job.documents, self._columns)
        check_context_has_text(job.prompt, job.documents)
        self._document_queries: DocumentQueries | None = None
        self.shared_queries: tuple[Query, ...] = ()
        if not isinstance(job.queries, QueryTable):
            self.shared_queries = job.queries
        else:
            self._table_state = table_state(job.queries)
            if job.queries.document_id is None:
                self.shared_queries = read_shared_queries(job.queries)
                self._use_columns(self.shared_queries)
            else:
                self._document_queries = self._read_document_queries(job.queries)
                self.documents = self._document_queries.documents
        self._tell_braces()
        self.stages, self._needed = self._check_chains(takes_along)
        self.rows = self._document_queries.rows if self._document_queries else self.documents * len(self.shared_queries)
        self._wanted: Collection[bytes] | None = None  # digests of the documents' ids; None for all
        self.is_part = False
        if self._selection:
            all_rows = self.rows
            self._wanted, self.rows = self._select()
            self.documents, self.is_part = len(self._wanted), self.rows < all_rows
        # Queries that stand for all settings that there are.
        self._kinds = self._document_queries.first_of_each_kind() if self._document_queries else self.shared_queries
        for query in self._kinds:
            query.check_settings(job.generation)
            if query.retries and job.scale.ranks > 1:
                raise JobError("scale.ranks: queries with retries need a model in one process")
        if shard is not None:  # the documents must be read, because groups depend on the length of texts
            self.documents = self.rows = 0
            for document in self.stream():
                self.documents += 1
                self.rows += len(document.wanted)

    @property
    def queries(self) -> Sequence[Query]:
        """The wanted queries, one for each id: of queries that belong to documents, the first one with that id."""
        return [query for query in self.all_queries() if self._wants_query(query.id)]

    def all_queries(self) -> Sequence[Query]:
        """Return the queries of the whole job, one for each id, as `queries` has those that are wanted."""
        return self._document_queries.first_of_each_id() if self._document_queries else self.shared_queries

    @property
    def schemas(self) -> dict[str, str]:
        """The JSON schemas that answers must follow, each with the id of the first query that has it."""
        return {query.json_schema: query.id for query in reversed(self._kinds) if query.json_schema}

    @property
    def query_with_evidence(self) -> str | None:
        """The id of a query that wants evidence, or None."""
        return next((query.id for query in self._kinds if query.evidence), None)

    def queries_changed(self) -> bool:
        """Return whether the table of queries has changed since it was read."""
        table = self._job.queries
        return isinstance(table, QueryTable) and table_state(table) != self._table_state

    def stream(self) -> Iterator[Document]:
        """Yield the wanted documents in order, each with its queries."""
        if self._shard is None and not self._selection:
            return self._all_documents()
        return chain.from_iterable(self.groups())

    def groups(self, alone: Collection[str] = ()) -> Iterator[list[Document]]:
        """Yield the same documents in groups that are answered together; documents in `alone` share no batch.

        Which documents share a group does not depend on the selection.
        """
        if self._wanted is None:
            yield from self._all_groups(alone)
            return
        left = len(self._wanted)
        for group in self._all_groups(alone):
            if wanted := [self._narrowed(document) for document in group if self._wants(document.id)]:
                yield wanted
            left -= len(wanted)
            if left <= 0:
                return

    def pairs(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each wanted document's id with the ids of its wanted queries, in order."""
        for document_id, query_ids in self.all_pairs():
            if self._wants(document_id):
                yield document_id, list(filter(self._wants_query, query_ids))

    def all_pairs(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the ids of all documents of the job, or of the shard, with those of their queries.

        Texts are read only for a shard.
        """
        if self._shard is not None:
            for group in self._all_groups():
                yield from ((document.id, [query.id for query in document.queries]) for document in group)
        else:
            yield from self.job_pairs()

    def job_pairs(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the ids of all documents of the job, whatever the shard, with those of their queries."""
        for document_id in document_ids(self._job.documents):
            if query_ids := self.query_ids(document_id):
                yield document_id, query_ids

    def query_ids(self, document_id: str) -> list[str]:
        """Return the ids of all queries that are asked of a document of the job, in order."""
        if self._document_queries:
            return self._document_queries.ids_of(document_id)
        return [query.id for query in self.shared_queries]

    def _wants(self, document_id: str) -> bool:
        return self._wanted is None or document_digest(document_id) in self._wanted

    def _wants_query(self, query_id: str) -> bool:
        return self._selection.has_query(query_id) or query_id in self._needed

    def _narrowed(self, document: Document) -> Document:
        others = (query.id for query in document.queries if not self._wants_query(query.id))
        return replace(document, left_out=frozenset(others))

    def _select(self) -> tuple[Collection[bytes], int]:
        """Return the digests of the wanted documents and the number of wanted rows, those of all shards together."""
        selection, rows = self._selection, 0
        wanted: set[bytes] = set()
        no_document, no_query = set(selection.documents), set(selection.queries)
        for document_id, query_ids in self.job_pairs():
            no_document = {pattern for pattern in no_document if not matches(document_id, pattern)}
            no_query = {pattern for pattern in no_query if not any(matches(name, pattern) for name in query_ids)}
            is_asked = any(map(selection.has_query, query_ids))
            if is_asked and selection.has_document(document_id) and len(wanted) != selection.limit:
                wanted.add(document_digest(document_id))
                rows += sum(map(self._wants_query, query_ids))
        for pattern in sorted(no_document):
            raise JobError(f"--document {pattern}: there is no such document in {self._job.documents.path}")
        for pattern in sorted(no_query):
            near = suggestion(pattern, [query.id for query in self.all_queries()])
            raise JobError(f"--query {pattern}: the job has no such query{near}")
        if not wanted:
            raise JobError(f"{selection}: none of these queries is asked of any of these documents")
        return wanted, rows

    def _all_groups(self, alone: Collection[str] = ()) -> Iterator[list[Document]]:
        batch_size = self._job.generation.batch_size
        return group_documents(self._all_documents(), batch_size, alone, self._shard, _stage_sizes)

    def _all_documents(self) -> Iterator[Document]:
        """Yield the documents of all shards that have queries."""
        for document in stream_documents(self._job.documents, self._columns):
            queries = self._document_queries.queries_of(document.id) if self._document_queries else self.shared_queries
            if queries:
                yield replace(document, queries=queries)

    def _use_columns(self, queries: Iterable[Query]) -> None:
        """Read the columns too that queries of a table use. Raises JobError, for one that is missing InputError."""
        if more := question_columns(queries, self._job.documents) - self._columns:
            self._columns |= more
            check_documents(self._job.documents, self._columns)

    def _check_chains(self, takes_along: bool) -> tuple[int, Collection[str]]:
        """Return the number of stages, and the ids of the queries whose answers the wanted ones need.

        Raises JobError if the queries of a document use answers that there are not, or in a circle.
        """
        if self._document_queries is None:
            chains = [chain_of(self.shared_queries)]
        elif self._document_queries.have_chains:
            names = document_ids(self._job.documents)
            chains = [chain_of(self._document_queries.queries_of(name)) for name in names]
        else:
            return 1, ()
        stages = max(len(chain.stages) for chain in chains)
        if stages > 1 and self._job.scale.ranks > 1:
            raise JobError("scale.ranks: queries that use other answers need a model in one process")
        if not takes_along or not self._selection.queries:
            return stages, ()
        named = {query.id for query in self.all_queries() if self._selection.has_query(query.id)}
        return stages, set[str]().union(*(chain.with_needed(named) for chain in chains))

    def _tell_braces(self) -> None:
        """Warn of queries whose texts look like templates, because nothing is filled in there."""
        if self._document_queries is not None:
            count, first = self._document_queries.with_braces, self._document_queries.first_with_braces
        else:
            found = [query for query in self.shared_queries if unfilled_place(query)]
            count, first = len(found), next(iter(found), None)
        if first is not None:
            _log.warning(
                "queries: the text of '%s'%s has %s, which the model reads as it is; `template: true` fills columns "
                "in, and `template: false` ends this warning",
                first.id,
                f" and of {count - 1:,} more" if count > 1 else "",
                unfilled_place(first),
            )

    def _read_document_queries(self, source: QueryTable) -> DocumentQueries:
        queries = DocumentQueries(source, document_ids(self._job.documents))
        if queries.have_chains or queries.have_checks:
            names = document_ids(self._job.documents)
            self._use_columns(query for name in names for query in queries.queries_of(name))
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


def _stage_sizes(document: Document) -> list[int]:
    return [len(stage) for stage in chain_of(document.queries).stages]
