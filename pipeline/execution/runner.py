"""A run from the first document to the result file. Start reading here.

    inputs → tasks → executor → committer → result

The inputs give documents in groups. The planner makes a task of each document. The executor answers the tasks of a
group together. The committer writes their rows. At the end, all rows are checked and written to one file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing

from pipeline.cache.speeds import Speeds, remember_speeds
from pipeline.errors import Interrupted, StoppedAtFailure
from pipeline.execution.commit import Committer
from pipeline.execution.confirmation import current_fingerprints
from pipeline.execution.context import RunContext, RunOptions
from pipeline.execution.executor import Executor, LocalExecutor
from pipeline.execution.fingerprint import job_identity, result_metadata
from pipeline.execution.finished_documents import FinishedDocuments
from pipeline.execution.planner import TaskPlanner
from pipeline.execution.pruning import find_surplus
from pipeline.inputs.documents import Document
from pipeline.inputs.inputs import Inputs
from pipeline.job.job import Job
from pipeline.job.shards import Shard
from pipeline.models.constraints import check_schemas
from pipeline.models.ranks import SINGLE, RankGroup
from pipeline.output.export import check_output, publish
from pipeline.output.results import Results
from pipeline.output.run_file import RunFile
from pipeline.progress import Observers, Progress, RunObserver
from pipeline.report import Report
from pipeline.signals import InterruptFlag

_log = logging.getLogger(__name__)


class Runner:
    """One run of one job, in this process.

    observer: receives the run's events; by default it shows bars or lines. report: of a run that was cut off; its
    counts go on. finished: the documents that it counts; they are skipped. quarantined: documents that get error rows
    in place of answers, with the reason. separated: documents that share no batch with others. options: what the
    command line asks of the run.
    shard: the share of the documents that the job was loaded for. ranks: the processes that hold the model together.
    executor: makes the executor, by default one that answers in this process.
    """

    def __init__(
        self,
        job: Job,
        observer: RunObserver | None = None,
        *,
        report: Report | None = None,
        finished: FinishedDocuments | None = None,
        quarantined: Mapping[str, str] | None = None,
        separated: Collection[str] = (),
        options: RunOptions | None = None,
        shard: Shard | None = None,
        ranks: RankGroup = SINGLE,
        executor: Callable[[RunContext, Inputs, FinishedDocuments], Executor] = LocalExecutor,
    ) -> None:
        self._job, self._shard, self._ranks, self._make_executor = job, shard, ranks, executor
        self._observer = observer or Progress()
        self._quarantined, self._separated = quarantined or {}, separated
        self._options = options or RunOptions()
        self._interrupt = InterruptFlag()
        self.report, self._finished = report or Report(), finished or FinishedDocuments()

    def run(self) -> Report:
        """Run the job, or resume it, and return the report. Its ``interrupted`` says that the user stopped the run.

        Raises JobError for errors in the job or its inputs, OutputError if the result cannot be written.
        """
        job, report, options = self._job, self.report, self._options
        started = time.monotonic() - report.seconds
        inputs = Inputs(job, self._shard, options.selection)
        check_schemas(inputs.schemas, inputs.query_with_evidence)
        check_output(job, inputs.all_queries())
        identity = job_identity(job)
        report.documents, report.rows = inputs.documents, inputs.rows
        metadata = result_metadata(job, identity, inputs.shared_queries, self._shard)
        with Results(job.result_file, metadata, url=job.result_url) as results:
            if not options.selection and not options.prune:
                find_surplus(results, inputs).refuse(job.output.path)
            progress = Progress(quiet=True, report=report)
            observer = Observers(progress, self._observer)
            observer.run_started(report.rows)
            try:
                part = options.selection, options.command
                run_file = RunFile(job, identity, report, started, inputs.shared_queries, *part, progress)
                with self._interrupt.listening(), run_file:
                    context = RunContext(job, identity, inputs.schemas, observer, self._interrupt.check, self._ranks)
                    executor = self._make_executor(context, inputs, self._finished)
                    planner = TaskPlanner(job, identity, options.keep_failed, self._quarantined, executor.versions)
                    committer = Committer(context, executor, results, report, options)
                    tasks = (
                        [planner.plan(document, results.rows(document.id)) for document in group]
                        for group in self._open_groups(inputs)
                    )
                    is_done = False
                    try:
                        with committer, closing(executor.execute(tasks)) as answered:
                            for group in answered:
                                committer.commit(group)
                        every = inputs.all_pairs() if options.selection else None
                        wanted = current_fingerprints(job, inputs, identity, planner, results)
                        report.rows_beside = results.finish(wanted, every) - report.rows
                        publish(job, results)
                        is_done = not inputs.is_part
                    except Interrupted as error:
                        report.interrupted = True
                        report.stopped_at = str(error) if isinstance(error, StoppedAtFailure) else None
                    finally:
                        executor.finish(is_done)
                        for stats in executor.take_stats():
                            report.add_work(stats)
                        if not report.workers:
                            remember_speeds(job.cache.dir, identity, Speeds.of(report))
            finally:
                observer.run_ended()
        if report.other_versions:
            _log.warning(
                "%d kept rows and %d stored segments are of other versions: %s; with `versions: redo` the job computes "
                "them again",
                report.rows_of_other_versions,
                report.segments_of_other_versions,
                report.other_versions,
            )
        return report

    def _open_groups(self, inputs: Inputs) -> Iterator[list[Document]]:
        """Yield the groups of documents that an earlier process of this run has not finished."""
        for group in inputs.groups(self._separated):
            if group[0].id not in self._finished:  # the documents of a group are finished together
                yield group
