"""The result: one crash-safe part per document while a job runs, one Parquet file when it is done.

    answers.parquet              the finished file, replaced whole
    answers.parquet.parts/ab/…   one file per document with all of its rows, readable as a dataset
    answers.parquet.parts/.group the rows of several documents, until each of them has its part
    answers.parquet.lock         held while a run writes

A result that belongs at a URL is written here too, uploaded when it is finished, and then only there.

A part holds every row of its document and is replaced whole, so a pair is there exactly once whatever crashes.
Documents that are committed together survive together or not at all: what a crash left of a group is distributed to
its parts when the result is next opened to write. A part wins over the finished file, whose rows are what an earlier
run answered. A part that cannot be read, or holds something else, is set aside and its rows count as not done. Same
rows, same bytes.

It knows which files there are and their order on disk; how rows are written and read is rows.py's. It does not know
what a fingerprint is made of, which rows are still good, or how answers come about.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from types import TracebackType

import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pipeline.errors import JobError, OutputError, RemoteError, one_line
from pipeline.files.atomic import atomic_file, disk_errors, make_folder
from pipeline.files.remote import upload
from pipeline.output.rows import (
    BROKEN,
    FORMAT,
    SCHEMA,
    FinishedFile,
    Row,
    document_digest,
    open_finished,
    read_rows,
    to_table,
    write_rows,
)
from turboquant.io.atomic import TEMPORARY, remove_leftovers

# Readers of datasets pass over names that start with a dot.
_SET_ASIDE = ".bad-"
_GROUP = ".group"
_DOCUMENTS_PER_GROUP = 1000
_BYTES_PER_GROUP = 8 << 20
# How long to wait for the lock: what held it may be the process of a run that was killed, which ends an instant later.
SECONDS_FOR_LOCK = 3.0
_log = logging.getLogger(__name__)


class Results:
    """The rows of one result, to be used as a context manager.

    Opened to write, it holds the lock, clears what a crash left half-written, and sets broken parts aside.
    `read_only` takes no lock and changes nothing, so that a running job can be looked at. `url` is where the finished
    file belongs, if not at `output`.

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
        self._lock = FileLock(f"{output}.lock", thread_local=False)  # rows are committed from any thread
        self._finished: FinishedFile | None = None
        self._listed: frozenset[int] | None = None  # parts there are, where nothing is going to be written

    def __enter__(self) -> Results:
        if self.output.is_dir():
            raise JobError(f"{self.output}: is a folder; output.path must name a file")
        try:
            if self._read_only:
                self._listed = _list_parts(self.parts)  # first: a run that ends now moves them to the finished file
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
        self._lock.release()

    def rows(self, document_id: str) -> dict[str, Row]:
        """What is known of a document, by query id: from its part, else from the finished file."""
        rows = self._part_rows(document_id)
        if rows is None:
            rows = self._finished_rows(document_id)
        return {row.query_id: row for row in rows}

    def commit(self, documents: Mapping[str, Sequence[Row]]) -> None:
        """Replace all that is known of these documents: by id, all of their rows, kept and new.

        Once this returns, they survive a crash; until then, none or all of them do. Raises OutputError where the disk
        refuses.
        """
        for document_id, rows in documents.items():
            if {row.document_id for row in rows} - {document_id} or len({row.query_id for row in rows}) < len(rows):
                raise ValueError(f"the rows of '{document_id}' are another document's, or a query's given twice")
        self._require_writable()
        if len(documents) > 1:
            write_rows(self._group, [row for rows in documents.values() for row in rows])
        self._write_parts(documents)

    def finish(self, documents: Iterable[tuple[str, Sequence[str]]]) -> None:
        """Write the finished file: each document's rows by the given query ids, in the given order.

        Rows that are not asked for are dropped. Where one is missing, OutputError is raised, nothing changed.
        """
        self.replace(self._expected_rows(documents))

    def replace(self, documents: Iterable[list[Row]]) -> None:
        """Write the finished file of each document's rows, in the given order, in place of all that is known."""
        self._require_writable()
        with (
            atomic_file(self.output) as temporary,
            pq.ParquetWriter(temporary, self._schema, **FORMAT) as file,
        ):
            for group in _row_groups(documents):
                file.write_table(to_table(group, self._schema))
        self._close_finished()
        self._publish()
        self._finished = self._open_finished()
        # Until the parts are gone they say the same as the finished file, so a crash here does no harm.
        with disk_errors(self.parts, "cannot be removed"):
            if self.parts.exists():
                shutil.rmtree(self.parts)

    @property
    def exist(self) -> bool:
        """Whether anything was answered yet."""
        return self._finished is not None or self.parts.exists()

    def _publish(self) -> None:
        if self._url is None:
            return
        try:
            upload(self.output, self._url)
        except (JobError, RemoteError) as error:
            raise OutputError(f"{error}; until then the result is at {self.output}") from error
        with disk_errors(self.output, "cannot be removed"):
            self.output.unlink()

    def _open_finished(self) -> FinishedFile | None:
        here = open_finished(self.output)  # newer than what is at the URL
        return here if here is not None or self._url is None else open_finished(self._url)

    def _acquire(self) -> None:
        with disk_errors(self.output, "cannot be written"):
            make_folder(self.output.parent)
            try:
                self._lock.acquire(timeout=SECONDS_FOR_LOCK)
            except Timeout:
                raise OutputError(
                    f"{self.output}: another run is writing this result; wait for it, or set another output.path"
                ) from None
            self._clear_leftovers()

    def _close_finished(self) -> None:
        if self._finished is not None:
            self._finished.close()
        self._finished = None

    def _require_writable(self) -> None:
        if not self._lock.is_locked:
            raise RuntimeError("results that are not open for writing cannot be changed")

    def _clear_leftovers(self) -> None:
        remove_leftovers(self.output)
        for pattern in (f"{TEMPORARY}*", f"*/{TEMPORARY}*"):
            for leftover in self.parts.glob(pattern):
                leftover.unlink(missing_ok=True)
        self._distribute_group()

    def _write_parts(self, documents: Mapping[str, Sequence[Row]]) -> None:
        for document_id, rows in documents.items():
            write_rows(self._part(document_id), rows)
        with disk_errors(self._group, "cannot be removed"):
            self._group.unlink(missing_ok=True)

    def _distribute_group(self) -> None:
        """Write the parts that a run that was cut off had only written the group of."""
        try:
            rows = read_rows(self._group)
        except FileNotFoundError:
            return
        except BROKEN as error:
            self._set_aside(self._group, error)
            return
        self._write_parts({key: list(own) for key, own in groupby(rows, key=lambda row: row.document_id)})

    @property
    def _group(self) -> Path:
        return self.parts / _GROUP

    def _part(self, document_id: str) -> Path:
        name = _part_name(document_id)
        return self.parts / name[:2] / name

    def _part_rows(self, document_id: str) -> list[Row] | None:
        if self._listed is not None and hash(_part_name(document_id)) not in self._listed:
            return None
        part = self._part(document_id)
        try:
            rows = read_rows(part)
            if any(row.document_id != document_id for row in rows):
                raise ValueError("it holds another document's rows")
        except FileNotFoundError:
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

    def _finished_rows(self, document_id: str) -> list[Row]:
        if self._finished is None:
            return []
        try:
            return self._finished.rows(document_id)
        except BROKEN as error:
            _log.warning("%s: damaged, so its rows count as not done: %s", self.output, one_line(error))
            self._close_finished()
            return []

    def _expected_rows(self, documents: Iterable[tuple[str, Sequence[str]]]) -> Iterator[list[Row]]:
        seen: set[bytes] = set()
        for document_id, query_ids in documents:
            digest = document_digest(document_id)
            if digest in seen or len(set(query_ids)) < len(query_ids):
                raise ValueError(f"document '{document_id}' or one of its queries is expected twice")
            seen.add(digest)
            rows = self.rows(document_id)
            missing = [query_id for query_id in query_ids if query_id not in rows]
            if missing:
                raise OutputError(
                    f"{self.output}: document '{document_id}' has no row for query '{missing[0]}'; run the job again"
                )
            yield [rows[query_id] for query_id in query_ids]


def _part_name(document_id: str) -> str:
    return f"{sha256(document_id.encode()).hexdigest()[:32]}.parquet"


def _list_parts(parts: Path) -> frozenset[int]:
    """The parts that are there, as hashes of their names: to look for a file a document takes far longer."""
    names = (name for _, _, files in os.walk(parts) for name in files if name.endswith(".parquet"))
    return frozenset(map(hash, names))


def _row_groups(documents: Iterable[list[Row]]) -> Iterator[list[Row]]:
    """Whole documents, in groups that are small enough to be held in memory."""
    group: list[Row] = []
    count = size = 0
    for rows in documents:
        group += rows
        count += 1
        texts = [text for row in rows for text in (row.answer, row.answer_json, row.thinking, row.error) if text]
        size += sum(map(len, texts)) + 200 * len(rows)
        if count >= _DOCUMENTS_PER_GROUP or size >= _BYTES_PER_GROUP:
            yield group
            group, count, size = [], 0, 0
    if group:
        yield group
