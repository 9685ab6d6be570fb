"""A result to look at: that of a job file, finished or not, or a result file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import JobError, OutputError
from pipeline.job.job_file import load_job
from pipeline.job.shards import shards_folder
from pipeline.output.results import Results

_PARQUET = b"PAR1"


@contextmanager
def open_result(source: Path, overrides: Sequence[str] = ()) -> Iterator[Results]:
    """Open a result that is only read, finished or not.

    source: a job file, or the path of a result file. overrides: of keys of the job file. Raises JobError, and
    OutputError if there are no answers yet.
    """
    if is_result(source):
        if overrides:
            raise JobError(f"--set: {source} is a result file, which has no keys; name the job file")
        with Results(source, read_only=True) as results:
            yield results
        return
    job = load_job(source, overrides)
    with Results(job.result_file, url=job.result_url, read_only=True) as results:
        if not results.exist:
            command = "merge" if shards_folder(job.result_file).exists() else "run"
            again = shlex.join(["pipeline", command, str(source), *(f"--set={each}" for each in overrides)])
            raise OutputError(f"{job.output.path}: there are no answers yet; to get them: {again}")
        yield results


def is_result(source: Path) -> bool:
    """Return whether a path names a result file, or would if its run had ended, and no job file."""
    with suppress(OSError), source.open("rb") as file:
        return file.read(len(_PARQUET)) == _PARQUET
    return Path(f"{source}.parts").is_dir()
