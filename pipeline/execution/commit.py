"""The committer counts the rows of answered groups and writes them to the result. Here a row is declared done.

The rows of a group are written together. A group that was interrupted is answered again as a whole, so the same rows
share a batch wherever a run was interrupted.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from pipeline.errors import Interrupted, StoppedAtFailure
from pipeline.execution.context import RunContext, RunOptions
from pipeline.execution.executor import Executor
from pipeline.execution.task import GroupResult
from pipeline.output.results import Results
from pipeline.report import Report
from turboquant.runtime.versions import describe_difference


class Committer:
    """Commits groups in a thread of its own while the next group is computed; used as a context manager."""

    def __init__(
        self,
        context: RunContext,
        executor: Executor,
        results: Results,
        report: Report,
        options: RunOptions,
    ) -> None:
        self._observer, self._executor, self._results = context.observer, executor, results
        self._report, self._options = report, options
        # The segments of this group may be removed when its rows are written; the next group may need their disk space.
        self._must_wait = context.job.cache.budget is not None or context.job.cache.keep == "job"
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="results")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Committer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()
        if kind is None or issubclass(kind, Interrupted):
            self._wait()

    def commit(self, group: GroupResult) -> None:
        """Count a group's rows and start to write them.

        Raises OutputError if the previous group could not be written, StoppedAtFailure if a row failed and the run
        stops at failures.
        """
        report = self._report
        rows = [row for result in group.results for row in result.rows.values()]
        kept = [row for task in group.tasks for row in task.kept]
        failed = [row for row in rows if row.status == "error"]
        report.rows_kept += sum(row.status == "ok" for row in kept)
        report.rows_kept_unanswered += sum(row.status != "ok" for row in kept)
        for row in kept:
            if difference := describe_difference(row.versions, self._executor.versions):
                report.rows_of_other_versions += 1
                report.other_versions = report.other_versions or difference
        report.rows_answered += sum(row.status == "ok" for row in rows)
        report.rows_skipped += sum(row.status == "skipped" for row in [*rows, *kept])
        for row in [*failed, *(row for row in kept if row.status == "error")]:
            report.add_failure(str(row.error_type), row.failure)
        for row in [*rows, *kept]:
            if row.is_cut:
                report.cut.add(row)
        report.answer_tokens += sum(row.answer_tokens or 0 for row in rows)
        report.documents_done += len(group.tasks)
        report.documents_truncated += sum(result.truncated for result in group.results)
        report.documents_split += sum(result.split for result in group.results)
        for stats in self._executor.take_stats():
            report.add_work(stats)
        self._observer.rows_done(len(kept))
        self._wait()
        self._writing = self._writer.submit(self._write, group, report.copy())
        if self._must_wait:
            self._wait()
        if failed and self._options.stop_at_failure:
            raise StoppedAtFailure(failed[0].failure)

    def _write(self, group: GroupResult, report: Report) -> None:
        both = zip(group.tasks, group.results, strict=True)
        changed = [(task, result) for task, result in both if task.queries or task.rewritten]
        if changed:
            self._results.commit(
                {
                    task.document_id: [*task.kept, *(result.rows[query.id] for query in task.queries), *task.others]
                    for task, result in changed
                }
            )
        self._observer.documents_done([task.document_id for task in group.tasks], report)
        self._executor.committed(group)

    def _wait(self) -> None:
        """Wait until the last group is written. Raises OutputError if the disk refused it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
