"""``pipeline merge``: check the results of a job's shards and write the file that a run without shards writes.

The merged file has the same bytes. No shard is trusted: its metadata must fit the other shards, and each row must be
the row that the job asks for now. Memory holds one row group of one shard; a temporary database puts the rows in order.
No model is loaded.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import JobError
from pipeline.execution.fingerprint import job_identity, result_metadata
from pipeline.execution.planner import TaskPlanner
from pipeline.execution.pruning import find_surplus
from pipeline.files.temporary_database import spill_errors, temporary_database
from pipeline.inputs.documents import Document
from pipeline.inputs.inputs import Inputs
from pipeline.job.job import Job
from pipeline.job.shards import Shard, shards_folder
from pipeline.output.export import check_output, publish
from pipeline.output.results import Results
from pipeline.output.rows import Row, read_documents, read_metadata
from pipeline.output.run_file import RunFile
from pipeline.progress import with_progress_bar
from pipeline.report import Report

if TYPE_CHECKING:
    from turboquant.io.identity import Identity

_MOST_NAMED = 5
_TABLES = "CREATE TABLE documents (id TEXT PRIMARY KEY, shard INTEGER, rows TEXT)"


class _ShardsToRun(Exception):
    """The results do not fit together until these shards are run."""

    def __init__(self, message: str, *shards: Shard, purpose: str = "to put that right") -> None:
        super().__init__(message)
        self.shards, self.purpose = shards, purpose


def merge_shards(job: Job, quiet: bool, prune: bool, command: str, run_command: str) -> Report:
    """Write a job's result from its shards. Raises JobError if a shard is missing or does not fit the job.

    prune: rows of the result that the job does not ask for any more are removed; otherwise they are an error.
    command: see `RunFile`. run_command: the command that runs the whole job, for errors that say which shard to run.
    """
    started = time.monotonic()
    inputs, identity = Inputs(job), job_identity(job)
    check_output(job, inputs.all_queries())
    report = Report(documents=inputs.documents, rows=inputs.rows)
    try:
        files = _done_shards(shards_folder(job.result_file), identity)
        metadata = result_metadata(job, identity, inputs.shared_queries)
        with Results(job.result_file, metadata, url=job.result_url) as results:
            if not prune:
                find_surplus(results, inputs).refuse(job.output.path)
            merged = _Merge(job, inputs, identity, files, report)
            with RunFile(job, identity, report, started, inputs.shared_queries, command=command):
                results.replace(with_progress_bar(merged.documents(), inputs.documents, quiet))
                publish(job, results)
    except _ShardsToRun as error:
        commands = " && ".join(f"{run_command} --shard {shard}" for shard in error.shards)
        raise JobError(f"{error}; {error.purpose}: {commands}") from None
    return report


def _done_shards(folder: Path, identity: Identity) -> dict[Shard, Path]:
    """Return the results of all shards. Raises JobError unless each is a shard of this job and all are there."""
    files = sorted(file for file in folder.glob("*.parquet") if not file.name.startswith("."))
    shards: dict[Shard, Path] = {}
    for file in files:
        metadata = read_metadata(file)
        if "pipeline.shard" not in metadata:
            raise JobError(f"{file}: is not the result of a shard; move it away")
        shard = Shard.parse(metadata["pipeline.shard"])
        if shard in shards:
            other = shards[shard].name
            raise JobError(f"{file}: is shard {shard}, and so is {other}; remove the one that is not meant")
        for name, value in asdict(identity).items():
            if metadata.get(f"pipeline.{name}") != value:
                raise _ShardsToRun(f"{file}: is of another job: it has another {name} than this one", shard)
        shards[shard] = file
    if not shards:
        raise _ShardsToRun(f"{folder}: no shard is done", Shard(1, 2), purpose="to do the first of two")
    _check_complete(folder, shards)
    return shards


def _check_complete(folder: Path, shards: Mapping[Shard, Path]) -> None:
    first = {shard.count: file.name for shard, file in reversed(list(shards.items()))}
    if len(first) > 1:
        kinds = " and ".join(f"of {count:,} ({name})" for count, name in sorted(first.items()))
        raise JobError(f"{folder}: there are shards {kinds}; remove those that are not meant")
    (count,) = first
    expected = [Shard(number, count) for number in range(1, count + 1)]
    left = [shard for shard in expected if shard not in shards or Path(f"{shards[shard]}.parts").exists()]
    if left:
        named = ", ".join(map(str, left[:_MOST_NAMED]))
        more = f" and {len(left) - _MOST_NAMED:,} more" if len(left) > _MOST_NAMED else ""
        raise _ShardsToRun(f"{folder}: {len(left):,} of {count:,} shards are not done: {named}{more}", left[0])


class _Merge:
    """Holds the rows of all shards by document, and counts them in the report as they are taken."""

    def __init__(
        self, job: Job, inputs: Inputs, identity: Identity, files: Mapping[Shard, Path], report: Report
    ) -> None:
        self._inputs, self._report = inputs, report
        self._planner = TaskPlanner(job, identity, keep_failed=True)
        self._files, self._count = files, len(files)
        with spill_errors("the shards' rows"):
            self._database = temporary_database(self, _TABLES)
            for shard, file in files.items():
                for rows in read_documents(file):
                    self._store_rows(shard, rows)

    def documents(self) -> Iterator[list[Row]]:
        """Yield the rows of each document, in input order. Raises JobError if a shard lacks one."""
        for group in self._inputs.groups():
            shard = Shard.of(group[0].id, self._count)
            for document in group:
                rows = self._rows(document, shard)
                self._report.documents_done += 1
                self._report.rows_kept += sum(row.status == "ok" for row in rows)
                self._report.rows_skipped += sum(row.status == "skipped" for row in rows)
                for row in rows:
                    if row.is_cut:
                        self._report.cut.add(row)
                    if row.status == "error":
                        self._report.add_failure(str(row.error_type), row.failure)
                yield rows

    def _rows(self, document: Document, shard: Shard) -> list[Row]:
        """Return a document's rows if its shard has all of them as the job asks for them now."""
        stored = self._stored_rows(document.id, shard)
        task = self._planner.plan(document, stored)
        rows = {row.query_id: row for row in task.kept}
        for query_id, decided in task.decided.items():  # here, perhaps by other versions than the shard's
            row = stored.get(query_id)
            if row is not None and row == replace(decided, versions=row.versions):
                rows[query_id] = row
        missing = [query.id for query in document.queries if query.id not in rows]
        if missing:
            raise _ShardsToRun(
                f"{self._files[shard]}: has no row of document '{document.id}' and query '{missing[0]}' as the job is "
                "now",
                shard,
            )
        return [rows[query.id] for query in document.queries]

    def _stored_rows(self, document_id: str, shard: Shard) -> dict[str, Row]:
        query = "SELECT rows FROM documents WHERE id = ? AND shard = ?"
        with spill_errors("the shards' rows"):
            stored = self._database.execute(query, [document_id, shard.number]).fetchone()
        rows = [Row(**record) for record in json.loads(stored[0])] if stored else []
        return {row.query_id: row for row in rows}

    def _store_rows(self, shard: Shard, rows: Sequence[Row]) -> None:
        document_id = rows[0].document_id
        try:
            encoded = json.dumps([vars(row) for row in rows])
            self._database.execute("INSERT INTO documents VALUES (?, ?, ?)", [document_id, shard.number, encoded])
        except sqlite3.IntegrityError:
            query = "SELECT shard FROM documents WHERE id = ?"
            other = Shard(self._database.execute(query, [document_id]).fetchone()[0], self._count)
            raise _ShardsToRun(
                f"{self._files[shard]}: has document '{document_id}', and so has {self._files[other].name}: the job "
                "changed between them",
                other,
                shard,
            ) from None
