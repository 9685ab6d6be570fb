"""Who answers a run's groups of documents: this process by itself, or, elsewhere, workers on many machines.

A crew takes groups and gives them back answered; it has the prefixes, and minds which of them the job still needs. The
model is loaded only when the first row turns out to need it. Knows no results: what becomes of rows is commit.py's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.cache.pins import Pins, output_digest
from pipeline.errors import RowError
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.prompts import Renderer
from pipeline.job.job import Job
from pipeline.progress import RunObserver
from pipeline.report import Report
from pipeline.run.answering import Answering
from pipeline.run.fingerprint import context_label
from pipeline.run.task import DocumentTask

if TYPE_CHECKING:
    from pipeline.cache.store import Store
    from pipeline.run.engine import Engine
    from turboquant.io.identity import Identity


@dataclass(frozen=True)
class Run:
    """What all who have a part in a run must know of it. ``check`` raises Interrupted where the user asked to stop."""

    job: Job
    inputs: Inputs
    identity: Identity
    progress: RunObserver
    report: Report
    check: Callable[[], None]


class Executor(ABC):
    """Answers the groups of one run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._shared = Renderer(run.job.prompt).shared
        self._pins = Pins(run.job.cache.dir, run.job.result_file)

    def prepare(self, group: list[DocumentTask]) -> list[DocumentTask]:
        """A group whose turn comes soon, with what can be done beforehand; from any thread."""
        return group

    @abstractmethod
    def answered(self, groups: Iterator[list[DocumentTask]]) -> Generator[Sequence[DocumentTask]]:
        """The groups, each when nothing is left of it, in any order; to be closed. Raises Interrupted, and DiskFull."""

    def committed(self, group: Sequence[DocumentTask]) -> None:
        """The rows of a group are on disk; from any thread."""
        if not self._is_loaded:
            return
        for todo in group:
            if todo.rendered is not None and todo.succeeded:
                self._pins.unpin(todo.label)
                if todo.queries and self._run.job.cache.keep == "job":
                    self._drop(todo)

    def finish(self, done: bool) -> None:
        """The run is over, and the job as well if ``done``."""
        if not self._is_loaded and not done:
            return
        if self._is_loaded and done and self._shared:
            self._pins.unpin(context_label(self._shared))
        if done and self._run.job.cache.keep == "job":  # a run before may have been killed when all was answered
            self._drop_all()
        self._pins.close()

    @property
    @abstractmethod
    def _is_loaded(self) -> bool:
        """Whether anything was left to answer."""

    @abstractmethod
    def _drop(self, todo: DocumentTask) -> None:
        """Remove a document's prefix, which the job needs no more."""

    @abstractmethod
    def _drop_all(self) -> None:
        """Remove all prefixes that the job has built."""

    def _labels_to_come(self) -> Iterator[str]:
        renderer = Renderer(self._run.job.prompt)
        if self._shared:
            yield context_label(self._shared)
        for document in islice(self._run.inputs.stream(), self._run.report.documents_done, None):
            with suppress(RowError):
                yield context_label(renderer.render(document))


class LocalExecutor(Executor):
    """This process, one group after the other, while the next is made ready in another thread."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._loaded: Engine | None = None

    def prepare(self, group: list[DocumentTask]) -> list[DocumentTask]:
        """Tokenise the prompts, and restore what the store has of the prefixes, once there is an engine for that."""
        if self._loaded is not None:
            for todo in group:
                self._loaded.make_ready(todo)
        return group

    def answered(self, groups: Iterator[list[DocumentTask]]) -> Generator[Sequence[DocumentTask]]:
        """The groups in their order."""
        run, answering = self._run, None
        for group in groups:
            run.check()
            if answering is None and any(todo.open for todo in group):
                answering = Answering(self._load(), run.job.retries, run.progress, run.report, run.check)
            if answering is not None:
                answering.answer(group)
            else:
                run.progress.rows_done(sum(len(todo.rows) for todo in group))
            yield group

    @property
    def _is_loaded(self) -> bool:
        return self._loaded is not None

    def _load(self) -> Engine:
        from pipeline.cache.store import open_store
        from pipeline.run.engine import Engine

        run, store = self._run, open_store(self._run.job.cache, self._pins.is_pinned)
        self._pins.pin(self._labels_to_come(), store.make_room)
        schemas = run.inputs.schemas
        self._loaded = Engine(run.job, run.identity, store, self._shared, schemas, run.progress, run.report, run.check)
        return self._loaded

    def _drop(self, todo: DocumentTask) -> None:
        assert self._loaded is not None
        own = self._loaded.own_keys(todo)
        drop_segments(self._loaded.store, self._run.job, own)

    def _drop_all(self) -> None:
        from pipeline.cache.store import open_store

        job = self._run.job
        drop_segments(self._loaded.store if self._loaded else open_store(job.cache, self._pins.is_pinned), job)


def drop_segments(store: Store, job: Job, keys: set[str] | None = None) -> None:
    """Remove segments that a job built, all unless ``keys`` are given; another may want to keep its own."""
    own = output_digest(job.result_file)
    store.remove_where(lambda entry: entry.metadata.get("output") == own and (keys is None or entry.key in keys))
