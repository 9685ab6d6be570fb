"""Executors answer the groups of a run: this process, or workers in others (pool_executor.py).

An executor also pins the contexts that the job still needs, so that no other run evicts their segments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.cache.codec import job_codec
from pipeline.cache.pins import Pins, output_digest
from pipeline.errors import RowError
from pipeline.execution.context import RunContext
from pipeline.execution.fingerprint import context_label
from pipeline.execution.finished_documents import FinishedDocuments
from pipeline.execution.task import DocumentTask, GroupResult, TaskResult
from pipeline.inputs.batching import ahead
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.prompts import Renderer
from pipeline.job.job import Job
from pipeline.models.loading import model_folder, prepare_kernels, read_config
from pipeline.report import WorkStats
from turboquant.runtime.versions import computing_versions

if TYPE_CHECKING:
    from collections.abc import Collection

    from pipeline.cache.store import Store
    from pipeline.execution.engine import Engine
    from pipeline.execution.prepared import PreparedTask


class Executor(ABC):
    """Answers the groups of one run. The model is loaded only when a row needs it.

    finished: the documents that an earlier process of this run has finished. Their contexts are not pinned, and neither
    are those of the documents that are yielded before the model is needed, which a subclass counts.
    """

    def __init__(self, context: RunContext, inputs: Inputs, finished: FinishedDocuments) -> None:
        self._context, self._job, self._inputs = context, context.job, inputs
        self._finished, self._documents_yielded = finished, 0
        self._shared = Renderer(context.job.prompt, context.job.documents).shared
        self._pins = Pins(context.job.cache.dir, context.job.result_file)
        if inputs.is_part:
            self._pins.keep_earlier()

    @abstractmethod
    def execute(self, groups: Iterator[list[DocumentTask]]) -> Generator[GroupResult]:
        """Yield each group when all of it is answered, in any order. Close the generator after use.

        Raises Interrupted and DiskFull.
        """

    @abstractmethod
    def take_stats(self) -> list[WorkStats]:
        """Return the statistics of the work since the last call."""

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions that compute the answers, as far as they are the same for all of them."""
        return computing_versions()

    @property
    @abstractmethod
    def has_started(self) -> bool:
        """Whether any row needed the model."""

    @abstractmethod
    def _drop(self, task: DocumentTask, result: TaskResult) -> None:
        """Remove the segments of a document that the job does not need any more."""

    @abstractmethod
    def _drop_all(self) -> None:
        """Remove all segments that the job has built."""

    def committed(self, group: GroupResult) -> None:
        """Release the pins of a group whose rows are on disk. Called from any thread."""
        if not self.has_started:
            return
        for task, result in zip(group.tasks, group.results, strict=True):
            rows = [*task.kept, *task.others, *result.rows.values()]
            answered = {row.query_id for row in rows if row.status != "error"}
            if task.rendered is not None and all(query.id in answered for query in task.document.queries):
                self._pins.unpin(task.label)
                if task.queries and self._job.cache.keep == "job":
                    self._drop(task, result)

    def finish(self, done: bool) -> None:
        """End the run. done: whether the whole job is done; if not, what it still needs stays pinned."""
        if not self.has_started and not done:
            return
        if self.has_started and done and self._shared:
            self._pins.unpin(context_label(self._shared))
        if done and self._job.cache.keep == "job":  # a killed run may have left segments after the last answer
            self._drop_all()
        self._pins.close()

    def _labels_to_come(self) -> Iterator[str]:
        """Yield the labels of the contexts that the run still needs."""
        renderer = Renderer(self._job.prompt, self._job.documents)
        if self._shared:
            yield context_label(self._shared)
        left = (document for document in self._inputs.stream() if document.id not in self._finished)
        for document in islice(left, self._documents_yielded, None):
            with suppress(RowError):
                yield context_label(renderer.render(document))


class LocalExecutor(Executor):
    """Answers one group after the other in this process, while another thread prepares the next group."""

    _engine: Engine | None = None

    def execute(self, groups: Iterator[list[DocumentTask]]) -> Generator[GroupResult]:
        """Yield the groups in their order."""
        context = self._context
        with closing(ahead(groups, self._prepare)) as prepared_groups:
            for tasks, prepared in prepared_groups:
                context.check()
                if any(task.open_queries for task in tasks) or self._engine is not None:
                    engine = self._engine = self._engine or self._load_engine()
                    results = engine.answer(prepared or [engine.prepare(task) for task in tasks])
                else:
                    results = [TaskResult.without_model(task) for task in tasks]
                    context.observer.rows_done(sum(len(result.rows) for result in results))
                yield GroupResult(tasks, results)
                self._documents_yielded += len(tasks)

    def take_stats(self) -> list[WorkStats]:
        """Return the statistics of the work since the last call."""
        return [] if self._engine is None else [self._engine.take_stats()]

    @property
    def has_started(self) -> bool:
        """Whether the model is loaded."""
        return self._engine is not None

    def _prepare(self, tasks: list[DocumentTask]) -> tuple[list[DocumentTask], list[PreparedTask] | None]:
        """Prepare a group in another thread. The first groups are not prepared, since no model is loaded yet."""
        engine = self._engine
        return tasks, None if engine is None else [engine.prepare(task) for task in tasks]

    def _load_engine(self) -> Engine:
        # Imported here, because a run with nothing to do does not need MLX.
        prepare_kernels(read_config(model_folder(self._job)), job_codec(self._job.cache))
        from pipeline.cache.store import open_store
        from pipeline.execution.engine import Engine

        store = open_store(self._job.cache, self._pins.is_pinned)
        self._pins.pin(self._labels_to_come(), store.make_room)
        return Engine(self._context, store)

    def _drop(self, task: DocumentTask, result: TaskResult) -> None:
        assert self._engine is not None
        drop_segments(self._engine.store, self._job, result.own_keys)

    def _drop_all(self) -> None:
        from pipeline.cache.store import open_store

        store = self._engine.store if self._engine else open_store(self._job.cache, self._pins.is_pinned)
        drop_segments(store, self._job)


def drop_segments(store: Store, job: Job, keys: Collection[str] | None = None) -> None:
    """Remove segments that this job built: all of them, or those with the given keys."""
    store.remove_built(output_digest(job.result_file), keys)
