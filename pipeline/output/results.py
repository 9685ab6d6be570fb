"""The result of a job: one crash-safe part for each document while the job runs, one Parquet file at the end.

    answers.parquet              the finished file, which is always replaced whole
    answers.parquet.parts/ab/…   one file for each document with all of its rows, readable as a dataset
    answers.parquet.parts/.group the rows of several documents, until each of them has its part
    answers.parquet.lock         held while a run writes

A result that belongs at a URL is written here first. It is uploaded when it is finished, and then removed here.

A part holds every row of its document and is replaced whole, so each pair is there exactly once after any crash.
Documents that are committed together survive together or not at all: after a crash, the next writer distributes the
group file to the parts. A part has precedence over the finished file, whose rows were answered by an earlier run. A
part that was read and is wrong, or that holds another document, is set aside, and its rows count as not done; a part
that cannot be read at the moment ends the run. The same rows give the same bytes.

How rows are written and read is in rows.py. Which rows are still valid is decided by the caller.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from types import TracebackType

import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pipeline.errors import JobError, OutputError, RemoteError, one_line
from pipeline.files.atomic import atomic_file, disk_errors, make_folder, output_file
from pipeline.files.remote import upload
from pipeline.files.writers import PARQUET_OPTIONS
from pipeline.inputs.documents import document_digest
from pipeline.job.shards import shards_folder
from pipeline.output.rows import (
    BROKEN,
    SCHEMA,
    FinishedFile,
    Row,
    open_finished,
    read_rows,
    reading,
    row_groups,
    to_table,
    write_rows,
)
from turboquant.io.atomic import TEMPORARY, remove_leftovers

# Readers of datasets pass over names that start with a dot.
_SET_ASIDE = ".bad-"
_GROUP = ".group"
# Time to wait for the lock: the process of a run that was just killed may hold it for another moment.
SECONDS_FOR_LOCK = 3.0
_log = logging.getLogger(__name__)


class Results:
    """The rows of one result; used as a context manager.

    While it is open for writing, it holds the lock. It completes or removes the files of a run that was killed, and
    sets broken parts aside.

    output: path of the finished file. metadata: facts about the job that are written to the finished file. url: where
    the finished file belongs, if not at `output`. read_only: take no lock and change nothing, so that the result of a
    running job can be read.

        with Results(output, {"job": fingerprint}) as results:
            if "summary" not in results.rows("doc-1"):
                results.commit({"doc-1": [Row("doc-1", "summary", "ok", fingerprint, answer="Yes.")]})
            results.finish([("doc-1", ["summary"])])
    """

    def __init__(
        self,
        output: Path,
        metadata: Mapping[str, str] | None = None,
        *,
        url: str | None = None,
        read_only: bool = False,
    ) -> None:
        self.output, self._url = output, url
        self.parts = Path(f"{output}.parts")
        self._schema = SCHEMA.with_metadata(dict(metadata or {}))
        self._read_only = read_only
        self._lock = FileLock(f"{output}.lock", thread_local=False)  # any thread may commit rows
        self._finished: FinishedFile | None = None
        self._replaced: list[FinishedFile] = []  # those before it, which `pairs` may be reading
        self._listed: frozenset[int] | None = None  # hashes of the names of all parts, if read-only

    def __enter__(self) -> Results:
        if self.output.exists() and not self.output.is_file():
            kind = "is a folder" if self.output.is_dir() else "is a device or a pipe"
            raise JobError(f"{self.output}: {kind}; output.path must name a file")
        try:
            if self._read_only:
                self._look()
            else:
                self._acquire()
                self._finished = self._open_finished()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_finished()
        for file in self._replaced:
            file.close()
        if self._url is not None and not (self._read_only or self.output.exists() or self.parts.exists()):
            self._remove_folder()
        self._lock.release()

    def rows(self, document_id: str) -> dict[str, Row]:
        """Return a document's rows by query id: those of its part, or else those of the finished file."""
        rows = self._part_rows(document_id)
        if rows is None and self._finished is not None:
            try:
                with reading(self.output):
                    rows = self._finished.rows(document_id)
            except BROKEN as error:
                self._give_up_finished(error)
        return {row.query_id: row for row in rows or ()}

    def commit(self, documents: Mapping[str, Sequence[Row]]) -> None:
        """Replace the rows of documents. documents: for each id all of its rows, kept and new.

        When this returns, the rows survive a crash. If it is interrupted, all or none of the documents are replaced.
        Raises OutputError if the disk refuses.
        """
        for document_id, rows in documents.items():
            if {row.document_id for row in rows} - {document_id} or len({row.query_id for row in rows}) < len(rows):
                raise ValueError(f"the rows of '{document_id}' are another document's, or a query's given twice")
        self._require_writable()
        if len(documents) > 1:
            write_rows(self._group, [row for rows in documents.values() for row in rows])
        self._write_parts(documents)

    def pairs(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each document that has rows, with the ids of their queries: in the finished file's order, then others.

        It may be that a document is yielded again while its rows are committed.
        """
        parts = set(self._part_names())
        while self._listed is not None and not self._listed <= set(map(hash, parts)):
            self._look()
            parts = set(self._part_names())
        for document_id, query_ids in self._finished_pairs():
            name = _part_name(document_id)
            yield document_id, list(self.rows(document_id)) if name in parts else query_ids
            parts.discard(name)
        for name in sorted(filter(self._is_listed, parts)):
            rows = self._read_part(self._part_path(name))
            if rows and _part_name(rows[0].document_id) == name:
                parts.remove(name)
                yield rows[0].document_id, [row.query_id for row in rows]
        if parts and self._read_only:  # a run that has ended meanwhile has moved them to the finished file
            for document_id, query_ids in self._finished_pairs():
                if _part_name(document_id) in parts:
                    yield document_id, query_ids

    def finish(
        self,
        documents: Iterable[tuple[str, Collection[str]]],
        every: Iterable[tuple[str, Sequence[str]]] | None = None,
    ) -> int:
        """Write the finished file with the rows of the given pairs, in the given order; return how many rows it has.

        documents: each document's id and query ids; a mapping gives the fingerprints that the rows must have. every:
        None drops all other rows. Else all other rows stay, and these pairs, of which `documents` is a part in the same
        order, say in which order. Raises OutputError, and changes nothing, if a row of `documents` is missing or has
        another fingerprint.
        """
        return self.replace(self._expected_rows(documents) if every is None else self._with_others(documents, every))

    def replace(self, documents: Iterable[list[Row]]) -> int:
        """Replace the whole result by these rows, given document by document; return how many they are."""
        self._require_writable()
        count = 0
        with (
            (output_file if self._url is None else atomic_file)(self.output) as temporary,  # no links in the store
            pq.ParquetWriter(temporary, self._schema, **PARQUET_OPTIONS) as file,
        ):
            for group in row_groups(documents):
                file.write_table(to_table(group, self._schema))
                count += len(group)
        self._close_finished()
        self._publish()
        self._finished = self._open_finished()
        # Until the parts are removed they hold the same rows as the finished file, so a crash here does no harm.
        with disk_errors(self.parts, "cannot be removed"):
            if self.parts.exists():
                shutil.rmtree(self.parts)
        return count

    @property
    def exist(self) -> bool:
        """Whether any row was ever written."""
        return self._finished is not None or bool(self._listed) or self.parts.exists()

    @property
    def metadata(self) -> dict[str, str]:
        """The facts about the job in the finished file; empty if there is none yet."""
        return {} if self._finished is None else self._finished.metadata

    def _publish(self) -> None:
        if self._url is None:
            return
        try:
            upload(self.output, self._url)
        except (JobError, RemoteError) as error:
            raise OutputError(f"{error}; until then the result is at {self.output}") from error
        with disk_errors(self.output, "cannot be removed"):
            self.output.unlink()

    def _remove_folder(self) -> None:
        """Remove what is left here of an uploaded result: the lock, and the run file, which is uploaded too.

        The results of shards stay, since they are nowhere else.
        """
        with suppress(OSError):
            for path in self.output.parent.iterdir():
                if path != shards_folder(self.output):
                    path.unlink()
            self.output.parent.rmdir()  # works only if there are no shards
            self.output.parent.parent.rmdir()  # works only if no other result waits to be uploaded

    def _open_finished(self) -> FinishedFile | None:
        here = open_finished(self.output)  # newer than the file at the URL
        return here if here is not None or self._url is None else open_finished(self._url)

    def _look(self) -> None:
        """List the parts, then open the finished file, because a run that ends now moves them there.

        The list is in memory, because asking the disk for each part takes far longer.
        """
        self._listed = frozenset(map(hash, self._part_names()))
        if self._finished is not None:
            self._replaced.append(self._finished)
        self._finished = self._open_finished()

    def _finished_pairs(self) -> Iterator[tuple[str, list[str]]]:
        if self._finished is not None:
            try:
                with reading(self.output):
                    yield from self._finished.pairs()
            except BROKEN as error:
                self._give_up_finished(error)

    def _acquire(self) -> None:
        with disk_errors(self.output, "cannot be written"):
            make_folder(self.output.parent)
            try:
                self._lock.acquire(timeout=SECONDS_FOR_LOCK)
            except Timeout:
                raise OutputError(
                    f"{self.output}: another run is writing this result; wait for it, or set another output.path"
                ) from None
            self._recover()

    def _give_up_finished(self, error: Exception) -> None:
        _log.warning("%s: damaged, so its rows count as not done: %s", self.output, one_line(error))
        self._close_finished()

    def _close_finished(self) -> None:
        if self._finished is not None:
            self._finished.close()
        self._finished = None

    def _require_writable(self) -> None:
        if not self._lock.is_locked:
            raise RuntimeError("results must be open for writing to be changed")

    def _recover(self) -> None:
        """Remove the temporary files of a run that was killed, and distribute the group that it had just written."""
        remove_leftovers(self.output)
        for pattern in (f"{TEMPORARY}*", f"*/{TEMPORARY}*"):
            for leftover in self.parts.glob(pattern):
                leftover.unlink(missing_ok=True)
        try:
            rows = read_rows(self._group)
        except FileNotFoundError:
            return
        except BROKEN as error:
            self._set_aside(self._group, error)
            return
        self._write_parts({key: list(own) for key, own in groupby(rows, key=lambda row: row.document_id)})

    def _write_parts(self, documents: Mapping[str, Sequence[Row]]) -> None:
        for document_id, rows in documents.items():
            write_rows(self._part(document_id), rows)
        with disk_errors(self._group, "cannot be removed"):
            self._group.unlink(missing_ok=True)

    @property
    def _group(self) -> Path:
        return self.parts / _GROUP

    def _part_names(self) -> Iterator[str]:
        for _, _, names in os.walk(self.parts):
            yield from (name for name in names if name.endswith(".parquet") and not name.startswith("."))

    def _part_path(self, name: str) -> Path:
        return self.parts / name[:2] / name

    def _part(self, document_id: str) -> Path:
        return self._part_path(_part_name(document_id))

    def _part_rows(self, document_id: str) -> list[Row] | None:
        part = self._part(document_id)
        return self._read_part(part, document_id) if self._is_listed(part.name) else None

    def _is_listed(self, name: str) -> bool:
        return self._listed is None or hash(name) in self._listed

    def _read_part(self, part: Path, document_id: str | None = None) -> list[Row] | None:
        """Return the rows of a part, or None. document_id: of the document whose rows they must be."""
        try:
            rows = read_rows(part)
            if any(row.document_id != (document_id or rows[0].document_id) for row in rows):
                raise ValueError("it holds another document's rows")
        except FileNotFoundError:
            if self._read_only and self._is_listed(part.name):  # a run has ended since the parts were listed
                self._look()
            return None
        except BROKEN as error:
            self._set_aside(part, error)
            return None
        return rows

    def _set_aside(self, part: Path, error: Exception) -> None:
        _log.warning("%s: cannot be used, so its rows count as not done: %s", part, one_line(error))
        if not self._read_only:
            with disk_errors(part, "cannot be set aside"):
                os.replace(part, part.with_name(_SET_ASIDE + part.name))

    def _expected_rows(self, documents: Iterable[tuple[str, Collection[str]]]) -> Iterator[list[Row]]:
        seen: set[bytes] = set()
        for document_id, query_ids in documents:
            digest = document_digest(document_id)
            if digest in seen or len(set(query_ids)) < len(query_ids):
                raise ValueError(f"document '{document_id}' or one of its queries is expected twice")
            seen.add(digest)
            rows = self.rows(document_id)
            self._require_rows(document_id, query_ids, rows)
            yield [rows[query_id] for query_id in query_ids]

    def _with_others(
        self, documents: Iterable[tuple[str, Collection[str]]], every: Iterable[tuple[str, Sequence[str]]]
    ) -> Iterator[list[Row]]:
        """Yield all rows that there are: those of `every` in its order, then the others in the order that they have."""
        required, seen = iter(documents), set()
        next_required = next(required, None)
        for document_id, query_ids in every:
            seen.add(document_digest(document_id))
            rows = self.rows(document_id)
            if next_required is not None and next_required[0] == document_id:
                self._require_rows(document_id, next_required[1], rows)
                next_required = next(required, None)
            if rows:
                yield [rows[query_id] for query_id in dict.fromkeys([*query_ids, *rows]) if query_id in rows]
        for document_id, _ in self.pairs():
            if document_digest(document_id) not in seen:
                yield list(self.rows(document_id).values())

    def _require_rows(self, document_id: str, query_ids: Collection[str], rows: Mapping[str, Row]) -> None:
        missing = next((query_id for query_id in query_ids if query_id not in rows), None)
        if missing is not None:
            raise OutputError(
                f"{self.output}: document '{document_id}' has no row for query '{missing}'; run the job again"
            )
        for query_id, fingerprint in query_ids.items() if isinstance(query_ids, Mapping) else ():
            if rows[query_id].fingerprint != fingerprint:
                if self._part(document_id).exists():
                    reason = "the document, the query or the prompt changed while the job ran"
                else:
                    reason = "its new row is gone, and the one of an earlier run is of another job"
                raise OutputError(
                    f"{self.output}: document '{document_id}', query '{query_id}': {reason}; no result is written; "
                    "the same command answers it again"
                )


def _part_name(document_id: str) -> str:
    return f"{sha256(document_id.encode()).hexdigest()[:32]}.parquet"
