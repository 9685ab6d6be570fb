"""The loop that ties it together: check, then document after document, then the result file and the report.

Knows the order of things and what happens when the user interrupts; what is done with a document is commit.py's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from typing import Any

from pipeline.errors import Interrupted, StoppedAtFailure
from pipeline.inputs.batching import ahead
from pipeline.inputs.documents import Document
from pipeline.inputs.inputs import Inputs
from pipeline.job.job import Job
from pipeline.job.shards import Shard
from pipeline.models.constraints import check_schemas
from pipeline.output.results import Results
from pipeline.output.run_file import RunFile
from pipeline.progress import Progress, RunObserver
from pipeline.report import Report
from pipeline.retry import OnFailure
from pipeline.run.commit import Work
from pipeline.run.executor import Executor, LocalExecutor, Run
from pipeline.run.fingerprint import job_identity, result_metadata
from pipeline.signals import stops_handled

_log = logging.getLogger(__name__)


class Runner:
    """One run of one job, in this process.

    ``run`` answers what is not answered yet and writes the result file. Raises JobError and its kin for what is wrong
    before anything is run, OutputError where the result cannot be written.

    ``watch`` makes, for a number of rows, who is told how the run goes on: bars and lines unless given. With
    ``report`` the run is the rest of one that was cut off: its documents done are passed over and its counts go on.
    ``condemned`` are documents that get error rows in place of answers, each with what the rows are to say; those in
    ``alone`` share no batch with others. ``on_failure``: what is done about rows that fail. ``shard``: whose the job is
    when it was loaded for one. ``crew``: makes who answers the documents, this process unless given.
    """

    def __init__(
        self,
        job: Job,
        quiet: bool = False,
        *,
        watch: Callable[[int], AbstractContextManager[RunObserver]] | None = None,
        report: Report | None = None,
        condemned: Mapping[str, str] | None = None,
        alone: Collection[str] = (),
        on_failure: OnFailure | None = None,
        shard: Shard | None = None,
        crew: Callable[[Run], Executor] = LocalExecutor,
    ) -> None:
        self._job, self._shard, self._crew = job, shard, crew
        self._watch = watch or partial(Progress, quiet=quiet)
        self._stop = Interruption()
        self.report = report or Report()
        self._condemned, self._alone = condemned or {}, alone
        self._on_failure = on_failure or OnFailure()

    def run(self) -> Report:
        """Run, or resume. Returns the report, whose ``interrupted`` says that the user stopped the run early."""
        started = time.monotonic() - self.report.seconds
        inputs = Inputs(self._job, self._shard)
        check_schemas(inputs.schemas)
        identity = job_identity(self._job)
        report = self.report
        report.documents, report.rows = inputs.documents, inputs.rows
        metadata = result_metadata(self._job, identity, self._shard)
        with (
            Results(self._job.result_file, metadata, url=self._job.result_url) as results,
            self._watch(report.rows) as progress,
            self._stop.listening(),
            RunFile(self._job, identity, report, started) as run_file,
        ):
            run = Run(self._job, inputs, identity, progress, report, self._stop.check)
            crew = self._crew(run)
            work = Work(run, crew, results, run_file.update, self._on_failure, self._condemned)
            try:
                with (
                    work,
                    closing(ahead(self._groups(inputs), work.look)) as todos,
                    closing(crew.answered(todos)) as answered,
                ):
                    for group in answered:
                        work.commit(group)
                results.finish(inputs.pairs())
                crew.finish(done=True)
            except Interrupted as error:
                report.interrupted = True
                report.stopped_at = str(error) if isinstance(error, StoppedAtFailure) else None
                crew.finish(done=False)
        return report

    def _groups(self, inputs: Inputs) -> Iterator[list[Document]]:
        """Those documents that are not done; a group is done whole."""
        passed = self.report.documents_done
        for group in inputs.groups(self._alone):
            if passed <= 0:
                yield group
            passed -= len(group)


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
