"""The loop that ties it together: check, then document after document, then the result file and the report.

Knows the order of things and what happens when the user interrupts; what is done with a document is work.py's.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.constraints import check_schemas
from pipeline.documents import Document, check_documents, stream_documents
from pipeline.durable import atomic_file
from pipeline.errors import Interrupted
from pipeline.groups import ahead, groups
from pipeline.identity import job_identity
from pipeline.job import Job
from pipeline.progress import Progress, Watcher
from pipeline.prompts import template_columns
from pipeline.report import Report
from pipeline.results import Results
from pipeline.signals import stops_handled
from pipeline.work import Work

if TYPE_CHECKING:
    from turboquant.identity import Identity

_log = logging.getLogger(__name__)


class Runner:
    """One run of one job, in this process.

    ``run`` answers what is not answered yet and writes the result file. Raises JobError and its kin for what is wrong
    before anything is run, OutputError where the result cannot be written.

    ``watch`` makes, for a number of rows, who is told how the run goes on: bars and lines unless given. With
    ``report`` the run is the rest of one that was cut off: its documents done are passed over and its counts go on.
    ``condemned`` are documents that get error rows in place of answers, each with what the rows are to say; those in
    ``alone`` share no batch with others.
    """

    def __init__(
        self,
        job: Job,
        quiet: bool = False,
        *,
        watch: Callable[[int], AbstractContextManager[Watcher]] | None = None,
        report: Report | None = None,
        condemned: Mapping[str, str] | None = None,
        alone: Collection[str] = (),
    ) -> None:
        self._job = job
        self._watch = watch or partial(Progress, quiet=quiet)
        self._stop = Interruption()
        self.report = report or Report()
        self._condemned, self._alone = condemned or {}, alone

    def run(self) -> Report:
        """Run, or resume. Returns the report, whose ``interrupted`` says that the user stopped the run early."""
        started = time.monotonic() - self.report.seconds
        check_schemas(self._job)
        columns = template_columns(self._job.prompt)
        summary = check_documents(self._job.documents, columns)
        identity = job_identity(self._job)
        report = self.report
        report.documents, report.rows = summary.count, summary.count * len(self._job.queries)
        with (
            Results(self._job.output.path, _metadata(self._job, identity)) as results,
            self._watch(report.rows) as progress,
            self._stop.listening(),
        ):
            work = Work(self._job, identity, results, progress, report, self._stop.check, self._condemned)
            try:
                with work, closing(ahead(self._groups(columns), work.look)) as todos:
                    for group in todos:
                        self._stop.check()
                        work.do(group)
                query_ids = [query.id for query in self._job.queries]
                ids = (document.id for document in stream_documents(self._job.documents, ()))
                results.finish((document_id, query_ids) for document_id in ids)
                work.finish(done=True)
            except Interrupted:
                report.interrupted = True
                work.finish(done=False)
            report.seconds = time.monotonic() - started
            self._write_report(identity)
        return report

    def _groups(self, columns: set[str]) -> Iterator[list[Document]]:
        """Those documents that are not done; a group is done whole."""
        job, passed = self._job, self.report.documents_done
        documents = stream_documents(job.documents, columns)
        for group in groups(documents, len(job.queries), job.generation.batch_size, self._alone):
            if passed <= 0:
                yield group
            passed -= len(group)

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

        with stops_handled(note):
            yield


def _metadata(job: Job, identity: Identity) -> dict[str, str]:
    described = {"job": job.name, **asdict(identity)}
    return {f"pipeline.{name}": value for name, value in described.items()}
