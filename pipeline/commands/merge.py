"""The results of a job's shards, checked and put together: the file that a run without shards writes, byte by byte.

Nothing is believed of a shard: what its file says it is has to fit the others', and each row has to be the one that
the job as it is now asks for. Memory holds a row group of one shard; the rows are put in order by way of a temporary
file. Knows no model.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import JobError, RowError
from pipeline.files.temporary_database import spill_errors, temporary_database
from pipeline.inputs.documents import Document
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.prompts import Renderer
from pipeline.inputs.windows import WindowCutter
from pipeline.job.job import Job
from pipeline.job.shards import Shard, shards_folder
from pipeline.output.results import Results
from pipeline.output.rows import Row, read_documents, read_metadata
from pipeline.output.run_file import RunFile
from pipeline.progress import watched
from pipeline.report import Report
from pipeline.run.fingerprint import job_identity, kept_rows, result_metadata, row_fingerprints

if TYPE_CHECKING:
    from turboquant.io.identity import Identity

_MOST_NAMED = 5
_TABLES = "CREATE TABLE documents (id TEXT PRIMARY KEY, shard INTEGER, rows TEXT)"


def merge_shards(job: Job, quiet: bool = True) -> Report:
    """Write the job's result from those of its shards. Raises JobError where they are not all of it, as it is now."""
    started = time.monotonic()
    inputs, identity = Inputs(job), job_identity(job)
    files = _done_shards(shards_folder(job.result_file), identity)
    report = Report(documents=inputs.documents, rows=inputs.rows)
    with Results(job.result_file, result_metadata(job, identity), url=job.result_url) as results:
        merged = _Merge(job, inputs, identity, files, report)
        with RunFile(job, identity, report, started):
            results.replace(watched(merged.documents(), inputs.documents, quiet))
    return report


def _done_shards(folder: Path, identity: Identity) -> dict[Shard, Path]:
    """The results of all shards, each of which says that it is one, and of the same identity and number."""
    files = sorted(file for file in folder.glob("*.parquet") if not file.name.startswith("."))
    found: dict[Shard, Path] = {}
    for file in files:
        told = read_metadata(file)
        if "pipeline.shard" not in told:
            raise JobError(f"{file}: is not the result of a shard; move it away")
        shard = Shard.parse(told["pipeline.shard"])
        if shard in found:
            raise JobError(f"{file}: is shard {shard}, and so is {found[shard].name}; remove the one that is not meant")
        for name, value in asdict(identity).items():
            if told.get(f"pipeline.{name}") != value:
                raise JobError(f"{file}: is of another job: its {name} and this one's are not the same; {_cure(shard)}")
        found[shard] = file
    if not found:
        raise JobError(f"{folder}: no shard is done; pipeline run JOB --shard 1/N does the first of N")
    _check_complete(folder, found)
    return found


def _check_complete(folder: Path, found: Mapping[Shard, Path]) -> None:
    first = {shard.count: file.name for shard, file in reversed(list(found.items()))}
    if len(first) > 1:
        kinds = " and ".join(f"of {count:,} ({name})" for count, name in sorted(first.items()))
        raise JobError(f"{folder}: there are shards {kinds}; remove those that are not meant")
    (count,) = first
    shards = [Shard(number, count) for number in range(1, count + 1)]
    left = [shard for shard in shards if shard not in found or Path(f"{found[shard]}.parts").exists()]
    if left:
        named = ", ".join(map(str, left[:_MOST_NAMED]))
        more = f" and {len(left) - _MOST_NAMED:,} more" if len(left) > _MOST_NAMED else ""
        raise JobError(f"{folder}: {len(left):,} of {count:,} shards are not done: {named}{more}; {_cure(left[0])}")


class _Merge:
    """The rows of all shards by document, which are counted as they are taken."""

    def __init__(
        self, job: Job, inputs: Inputs, identity: Identity, files: Mapping[Shard, Path], report: Report
    ) -> None:
        self._job, self._inputs, self._identity, self._report = job, inputs, identity, report
        self._renderer, self._fitting = Renderer(job.prompt), WindowCutter(job)
        self._files, self._count = files, len(files)
        with spill_errors("the shards' rows"):
            self._database = temporary_database(self, _TABLES)
            for shard, file in files.items():
                for rows in read_documents(file):
                    self._set_down(shard, rows)

    def documents(self) -> Iterator[list[Row]]:
        """The rows of each document, in input order. Raises JobError where a shard lacks one."""
        for group in self._inputs.groups():
            shard = Shard.of(group[0].id, self._count)
            for document in group:
                rows = self._rows(document, shard)
                self._report.documents_done += 1
                self._report.rows_kept += sum(row.status == "ok" for row in rows)
                for row in rows:
                    if row.status == "error":
                        self._report.add_failure(str(row.error_type), row.failure)
                yield rows

    def _rows(self, document: Document, shard: Shard) -> list[Row]:
        fingerprints = self._fingerprints(document)
        rows = kept_rows(self._known(document.id, shard), fingerprints, keep_failed=True)
        missing = [query_id for query_id in fingerprints if query_id not in rows]
        if missing:
            raise JobError(
                f"{self._files[shard]}: has no row of document '{document.id}' and query '{missing[0]}' as the job is "
                f"now; {_cure(shard)}"
            )
        return list(rows.values())

    def _fingerprints(self, document: Document) -> dict[str, str]:
        try:
            rendered = self._renderer.render(document)
        except RowError:
            return {query.id: "" for query in document.queries}
        cut = self._fitting.mark(rendered, document.queries)
        return row_fingerprints(self._identity, rendered, document.queries, self._job.generation, cut)

    def _known(self, document_id: str, shard: Shard) -> dict[str, Row]:
        which = "SELECT rows FROM documents WHERE id = ? AND shard = ?"
        with spill_errors("the shards' rows"):
            found = self._database.execute(which, [document_id, shard.number]).fetchone()
        rows = [Row(**record) for record in json.loads(found[0])] if found else []
        return {row.query_id: row for row in rows}

    def _set_down(self, shard: Shard, rows: Sequence[Row]) -> None:
        document_id = rows[0].document_id
        try:
            told = json.dumps([vars(row) for row in rows])
            self._database.execute("INSERT INTO documents VALUES (?, ?, ?)", [document_id, shard.number, told])
        except sqlite3.IntegrityError:
            which = "SELECT shard FROM documents WHERE id = ?"
            other = Shard(self._database.execute(which, [document_id]).fetchone()[0], self._count)
            raise JobError(
                f"{self._files[shard]}: has document '{document_id}', and so has {self._files[other].name}: the job "
                f"changed between them; pipeline run JOB with --shard {other} and then {shard} puts that right"
            ) from None


def _cure(shard: Shard) -> str:
    return f"pipeline run JOB --shard {shard} puts that right"
