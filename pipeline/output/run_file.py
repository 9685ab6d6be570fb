"""The run file, ``<output>.run.json``: the numbers of a run, replaced whole every few seconds and at the end.

If the result belongs at a URL, a copy of the run file is uploaded when the run starts, which shows early that files
can be written there, and again when the run ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import PipelineError, one_line
from pipeline.files.atomic import atomic_file
from pipeline.files.remote import RETRIES, upload
from pipeline.job.job import Job, Query
from pipeline.job.selection import Selection
from pipeline.output.provenance import provenance
from pipeline.progress import Progress
from pipeline.report import Report

if TYPE_CHECKING:
    from turboquant.io.identity import Identity

SECONDS_BETWEEN_WRITES = 2.0
State = Literal["running", "finished", "interrupted", "failed"]


class RunFile:
    """The run file of one run; a context manager, at whose end the file is complete.

    report: the run's report, whose seconds are set at the end. started: start of the run on the monotonic clock.
    queries: those that all documents share. part: the part of the job that is answered; None for all of it. command:
    the command that does this again from any folder, for readers of the file. progress: counts what is done so far; a
    thread writes it to the file every few seconds, so that the file moves while a long document is prefilled too.

    Raises OutputError if the disk refuses, and the errors of `upload`.
    """

    def __init__(
        self,
        job: Job,
        identity: Identity,
        report: Report,
        started: float,
        queries: Sequence[Query] = (),
        part: Selection | None = None,
        command: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._path = _path(job)
        self._job, self._identity, self._report, self._started = job, identity, report, started
        self._progress, self._ended = progress, Event()
        self._writer: Thread | None = None
        if progress is not None:
            self._writer = Thread(target=self._keep_current, args=(progress,), name="run file", daemon=True)
        self._part, self._command = asdict(part) if part else None, command
        self._provenance = provenance(job, queries)
        began = datetime.now(timezone.utc) - timedelta(seconds=time.monotonic() - started)
        self._start = began.isoformat(timespec="seconds")

    def __enter__(self) -> RunFile:
        self._write(self._report, "running")
        _publish(self._job)
        if self._writer is not None:
            self._writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._ended.set()
            self._writer.join()
        report = self._report
        report.seconds = time.monotonic() - self._started
        if error is None:
            self._write(report, "interrupted" if report.interrupted else "finished")
            _publish(self._job)
            return
        with suppress(PipelineError):  # the disk may be the reason why the run ends
            self._write(report, *_end(error))
            _publish(self._job, retries=0)

    def _keep_current(self, progress: Progress) -> None:
        """Write the numbers so far every few seconds. A disk that refuses is an error elsewhere, or at the end."""
        while not self._ended.wait(SECONDS_BETWEEN_WRITES):
            with suppress(PipelineError):
                seconds = time.monotonic() - self._started
                self._write(replace(progress.report, seconds=seconds), "running")

    def _write(self, report: Report, state: State, error: str | None = None) -> None:
        content = {
            "job": self._job.name,
            "part": self._part,
            "command": self._command,
            "state": state,
            "error": error,
            "started": self._start,
            "updated": _now(),
            **asdict(report),
            "pace": asdict(self._progress.pace()) if self._progress and state == "running" else None,
            "identity": asdict(self._identity),
            **self._provenance,
        }
        _replace(self._path, content)


def mark_ended(job: Job, error: BaseException) -> None:
    """Write to the run file that the run has ended, for a process that was killed before it could do so."""
    path = _path(job)
    with suppress(OSError, ValueError, PipelineError):
        content = json.loads(path.read_bytes())
        if content["state"] == "running":
            state, why = _end(error)
            _replace(path, content | {"state": state, "error": why, "updated": _now()})
            _publish(job, retries=0)


def _path(job: Job) -> Path:
    return job.result_file.with_name(f"{job.result_file.name}.run.json")


def _publish(job: Job, retries: int = RETRIES) -> None:
    if job.result_url is not None:
        upload(_path(job), f"{job.result_url}.run.json", retries)


def _end(error: BaseException) -> tuple[State, str | None]:
    return ("failed", one_line(error)) if isinstance(error, Exception) else ("interrupted", None)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
