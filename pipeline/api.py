"""The functions of the package, for programs and notebooks: what the commands do, with values in place of text.

    import pipeline
    result = pipeline.run("job.yaml", documents=frame)

A run has the same engine, files and promises as ``pipeline run``: a process of its own holds the model, an interrupted
or killed run goes on with the same call or with the command, and the result has the same bytes. Errors are exceptions
of `pipeline.errors`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow as pa
import yaml

from pipeline.commands.console import anywhere, quoted
from pipeline.commands.plan import Plan, plan_job
from pipeline.errors import Interrupted, JobError, OutputError
from pipeline.execution.context import RunOptions
from pipeline.execution.supervisor import Caller, supervise
from pipeline.files.atomic import atomic_file
from pipeline.files.frames import write_documents
from pipeline.job import job_file
from pipeline.job.job import Documents, Job, OutputLayout
from pipeline.job.selection import Selection
from pipeline.output.export import Export
from pipeline.output.results import Results
from pipeline.output.rows import Row
from pipeline.progress import Pace
from pipeline.report import Report
from turboquant.runtime.blas import load_tuned_blas

JobSource = str | Path | Mapping[str, Any] | Job
_UNKNOWN_PATH = "documents-in-memory"  # until they are written


@dataclass(frozen=True)
class Result:
    """The answers of a job that are on disk, read when they are asked for.

    report: the numbers of the run; None if the result was only opened.
    """

    job: Job
    report: Report | None = None

    @property
    def path(self) -> str:
        """The path or URL of the result file."""
        return self.job.output.path

    @property
    def table(self) -> pa.Table:
        """The rows: one for each document and query, with the columns of the documents that the job carries."""
        return self._table("long")

    def wide(self) -> pa.Table:
        """Return a table with one row for each document; docs/jobs.md describes its columns."""
        return self._table("wide")

    def to_pandas(self) -> Any:
        """Return `table` as a data frame of pandas, which must be installed."""
        return self.table.to_pandas(maps_as_pydicts="strict")

    def export(self, to: str | Path, layout: OutputLayout = "long") -> None:
        """Write the rows to Parquet, CSV or JSON Lines, as ``pipeline export`` does."""
        with self._open() as results:
            Export(results, self.job.documents, layout, self.job.output.columns).write(str(to))

    @property
    def failures(self) -> list[Row]:
        """The rows that have an error in place of an answer."""
        with self._open() as results:
            ids = dict.fromkeys(document_id for document_id, _ in results.pairs())
            return [row for id_ in ids for row in results.rows(id_).values() if row.status == "error"]

    def _table(self, layout: OutputLayout) -> pa.Table:
        with self._open() as results:
            export = Export(results, self.job.documents, layout, self.job.output.columns)
            return pa.concat_tables([export.schema.empty_table(), *export.tables()])

    @contextmanager
    def _open(self) -> Iterator[Results]:
        with Results(self.job.result_file, url=self.job.result_url, read_only=True) as results:
            if not results.exist:
                raise OutputError(f"{self.path}: there are no answers yet; pipeline.run makes them")
            yield results


def load_job(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Job:
    """Read and check a job file. Raises JobError.

    overrides: of keys of the file, as a mapping such as {"cache.key_bits": 3} or texts such as "cache.key_bits=3".
    """
    return job_file.load_job(Path(path), _as_texts(overrides))


def plan(job: JobSource, documents: object = None, *, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Plan:
    """Check everything and return what a run would cost, without loading weights. Raises JobError.

    The arguments are those of `run`.
    """
    load_tuned_blas()
    return plan_job(_job(job, documents, overrides)[0])


def result(job: JobSource, *, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Result:
    """Return the answers of a job that are there, also while it runs or after it was interrupted. Raises JobError."""
    texts = _as_texts(overrides)
    try:
        return Result(_load(job, texts))
    except JobError:  # if the documents were in memory, only the job that `run` wrote beside the result has their path
        with suppress(JobError):
            known = _load(job, [*texts, f"documents.path={_UNKNOWN_PATH}"])
            return Result(_with_documents(known, job_file.load_job(_written_job(known)).documents))
        raise


def run(
    job: JobSource,
    documents: object = None,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    document: Sequence[str] = (),
    query: Sequence[str] = (),
    limit: int | None = None,
    prune: bool = False,
    retry_failed: bool = True,
    quiet: bool = False,
    on_progress: Callable[[Pace], None] | None = None,
    stop: Event | None = None,
) -> Result:
    """Run a job, or resume it, and return its result. Rows that are answered already are kept.

    job: the path of a job file, a mapping with the same keys, whose paths are relative to the current folder, or a job.
    documents: in place of the job's: a path, a data frame, an Arrow table or an iterable of mappings. What is in memory
    is written beside the result once, and so is the job if it is no file, so that the command line can resume it:
    run.json has the command. overrides: as `load_job` has them. document, query, limit: the part of the job that is
    answered; ids or patterns of ids. prune: remove rows that the job does not ask for any more. retry_failed: try rows
    that failed before again. quiet: show no bars. on_progress: is called with the run's numbers, several times a second
    at most, in place of bars. stop: set it, from another thread, to interrupt the run as Ctrl-C does.

    Failed rows are no error: they are in `Result.failures`. Raises Interrupted if the run was interrupted; what is
    answered is kept, `result` returns it, and the same call goes on. Raises JobError, OutputError and others of
    `pipeline.errors`. May be called from any thread; Ctrl-C reaches it in the main thread only.
    """
    checked, command = _job(job, documents, overrides)
    selection = Selection(tuple(document), tuple(query), limit)
    options = RunOptions(selection, not retry_failed, prune=prune, command=command)
    try:
        report = supervise(checked, quiet or on_progress is not None, options, caller=Caller(on_progress, stop))
    except KeyboardInterrupt:
        raise _interrupted(command) from None
    if report.interrupted:
        raise _interrupted(command)
    return Result(checked, report)


def _interrupted(command: str) -> Interrupted:
    return Interrupted(
        f"interrupted; pipeline.result returns what is answered, and the same call resumes the run, or: {command}"
    )


def _job(source: JobSource, documents: object, overrides: Mapping[str, Any] | Sequence[str]) -> tuple[Job, str]:
    """Return a job, and the command that runs it from any folder. Documents and jobs in memory are written to files."""
    texts = _as_texts(overrides)
    if isinstance(documents, str | Path):
        texts.append(f"documents.path={json.dumps(str(documents))}")
        documents = None
    elif documents is not None:
        texts.append(f"documents.path={_UNKNOWN_PATH}")
    job = _load(source, texts)
    if documents is not None:
        path = write_documents(documents, Path(f"{job.result_file}.documents"))
        job = _with_documents(job, Documents(**dict(job.documents) | {"path": str(path)}))
    elif isinstance(source, str | Path):
        return job, _command(Path(source), texts)
    file = _written_job(job)
    with atomic_file(file) as temporary:
        temporary.write_text(
            yaml.safe_dump(_plain(job.model_dump(exclude_defaults=True)), allow_unicode=True, sort_keys=False),
            encoding="utf-8",
        )
    return job_file.load_job(file), _command(file, [])


def _load(source: JobSource, overrides: Sequence[str]) -> Job:
    if isinstance(source, str | Path):
        return job_file.load_job(Path(source), overrides)
    tree = _plain(source.model_dump(exclude_defaults=True) if isinstance(source, Job) else source)
    return job_file.make_job(tree, Path.cwd(), "job", overrides)


def _with_documents(job: Job, documents: Documents) -> Job:
    return Job.model_validate(dict(job) | {"documents": documents})


def _written_job(job: Job) -> Path:
    """Return the file to which a job is written if the command line could not resume it otherwise."""
    return Path(f"{job.result_file}.job.yaml")


def _plain(value: Any) -> Any:
    """Return a mapping with everything in it as YAML holds it."""
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return str(value) if isinstance(value, Path) else value


def _command(file: Path, overrides: Sequence[str]) -> str:
    sets = [word for text in overrides for word in ("--set", text)]
    return anywhere(quoted(["pipeline", "run", str(file), *sets]))


def _as_texts(overrides: Mapping[str, Any] | Sequence[str]) -> list[str]:
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    return list(overrides)
