"""The loop that ties it together: check, then document after document, then the result file and the report.

Knows the order of things and what happens when the user interrupts; what is done with a document is work.py's.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.documents import check_documents, stream_documents
from pipeline.errors import Interrupted
from pipeline.identity import job_identity
from pipeline.job import Job
from pipeline.progress import Progress
from pipeline.prompts import template_columns
from pipeline.results import Results, atomic_file
from pipeline.work import Report, Work

if TYPE_CHECKING:
    from turboquant.identity import Identity

_log = logging.getLogger(__name__)


class Runner:
    """One run of one job.

    ``run`` answers what is not answered yet and writes the result file. Raises JobError and its kin for what is wrong
    before anything is run, OutputError where the result cannot be written.
    """

    def __init__(self, job: Job, quiet: bool = False) -> None:
        self._job = job
        self._quiet = quiet
        self._stop = Interruption()
        self.report = Report()

    def run(self) -> Report:
        """Run, or resume. Returns the report, whose ``interrupted`` says that the user stopped the run early."""
        started = time.monotonic()
        columns = template_columns(self._job.prompt)
        summary = check_documents(self._job.documents, columns)
        identity = job_identity(self._job)
        report = self.report
        report.documents, report.rows = summary.count, summary.count * len(self._job.queries)
        with (
            Results(self._job.output.path, _metadata(self._job, identity)) as results,
            Progress(report.rows, self._quiet) as progress,
            self._stop.listening(),
        ):
            work = Work(self._job, identity, results, progress, report, self._stop.check)
            try:
                for document in stream_documents(self._job.documents, columns):
                    self._stop.check()
                    work.do(document)
                query_ids = [query.id for query in self._job.queries]
                ids = (document.id for document in stream_documents(self._job.documents, ()))
                results.finish((document_id, query_ids) for document_id in ids)
            except Interrupted:
                report.interrupted = True
            report.seconds = time.monotonic() - started
            self._write_report(identity)
        return report

    def _write_report(self, identity: Identity) -> None:
        versions = {name: metadata.version(name) for name in ("mlx", "mlx-lm")} | {"turboquant-pipeline": __version__}
        content = {
            "job": self._job.name,
            **asdict(self.report),
            "identity": asdict(identity),
            "versions": versions,
        }
        with atomic_file(self._job.output.path.with_name(f"{self._job.output.path.name}.run.json")) as path:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Interruption:
    """SIGINT as a wish: the first asks to stop at the next good place, a second stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        """Raise Interrupted if the user asked to stop."""
        if self.asked:
            raise Interrupted("interrupted")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the block runs, SIGINT and SIGTERM are noted; a second one raises KeyboardInterrupt."""

        def note(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            _log.warning("interrupted: finishing the rows in hand; once more to stop at once")

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _metadata(job: Job, identity: Identity) -> dict[str, str]:
    described = {"job": job.name, **asdict(identity)}
    return {f"pipeline.{name}": value for name, value in described.items()}
