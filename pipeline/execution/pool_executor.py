"""An executor whose workers are processes, on this machine or on those of a Ray cluster. They answer groups as leases.

A pool starts the workers, carries leases and results, and reports deaths (worker_pool.py). Which group is next, and
what happens to the group of a lost worker, is decided in leases.py.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from pipeline.cache.hit_index import label_number
from pipeline.errors import Interrupted
from pipeline.execution.asking import Asker
from pipeline.execution.context import RunContext
from pipeline.execution.executor import Executor, drop_segments
from pipeline.execution.finished_documents import FinishedDocuments
from pipeline.execution.lease_worker import TokenCounts, WorkerReply
from pipeline.execution.leases import Lease, Leases
from pipeline.execution.quarantine import name_documents
from pipeline.execution.task import DocumentTask, GroupResult, TaskResult
from pipeline.execution.worker_pool import LEASES_PER_WORKER, WorkerHandle, WorkerLost, WorkerPool
from pipeline.inputs.batching import ahead
from pipeline.inputs.inputs import Inputs
from pipeline.report import WorkerReport, WorkStats

_MOST_LABELS = 1_000_000  # labels of which it is remembered which store has them
_SECONDS_PER_WAIT = 0.2
_SECONDS_FOR_DROPPING = 60.0
_log = logging.getLogger(__name__)


class PoolExecutor(Executor):
    """Hands out the groups of a run to the workers of a pool."""

    def __init__(self, context: RunContext, inputs: Inputs, finished: FinishedDocuments, pool: WorkerPool) -> None:
        super().__init__(context, inputs, finished)
        self._pool = pool
        self._asker = Asker(context.job, context.identity)
        self._events: SimpleQueue[Callable[[], GroupResult | None]] = SimpleQueue()  # filled by the pool's threads
        self._has_started = False
        self._stats: list[WorkStats] = []  # not taken yet
        self._known_stores: set[str] = set()  # stores whose labels are known or asked for
        self._store_of_label: dict[int, str] = {}  # by the label's number
        self._worker_of_document: dict[str, tuple[WorkerHandle, Collection[str]]] = {}  # and its own segments
        self._devices: set[str] = set()
        self._last_tokens = time.monotonic()  # when workers told of tokens, or were asked

    def execute(self, groups: Iterator[list[DocumentTask]]) -> Generator[GroupResult]:
        """Yield the groups as they are answered."""
        context = self._context
        with closing(ahead(groups, lambda group: group)) as read_ahead:
            self._leases = leases = Leases(read_ahead, self._find_store, self._asker.give_up)
            while not leases.are_done():
                for tasks in leases.take_done():
                    yield self._counted(GroupResult(tasks, [TaskResult.without_model(task) for task in tasks]))
                try:
                    self._context.check()
                except Interrupted:
                    yield from self._finish_leases()
                    raise
                if leases.has_more():
                    for worker in self._pool.start_missing():
                        started = worker.call("start", context.identity, self.versions, list(context.schemas))
                        self._when_done(started, self._on_started, worker)
                    if not self._has_started:
                        self._has_started = True
                        self._pins.pin(self._labels_to_come())
                self._give_leases()
                if (answered := self._next_event()()) is not None:
                    yield answered

    def take_stats(self) -> list[WorkStats]:
        """Return the statistics of the work since the last call."""
        stats, self._stats = self._stats, []
        return stats

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions that compute the answers, as far as they are the same for all workers."""
        return self._pool.versions

    @property
    def has_started(self) -> bool:
        """Whether workers were started."""
        return self._has_started

    def _counted(self, group: GroupResult, shown: int = 0) -> GroupResult:
        """Count a group's documents, and its rows but for those that were shown."""
        self._documents_yielded += len(group.tasks)
        self._context.observer.rows_done(sum(len(result.rows) for result in group.results) - shown)
        return group

    # ---- leases

    def _give_leases(self) -> None:
        """Give leases to the workers with the fewest. No worker waits for leases that another has not started."""
        ready = [worker for worker in self._pool.workers.values() if worker.store is not None]
        with_room = [worker for worker in ready if worker.has_room]
        for held in range(LEASES_PER_WORKER):
            for worker in with_room:
                if len(worker.leases) == held and worker.has_room:
                    lease = self._leases.take(str(worker.store), is_idle=not held)
                    if lease is not None:
                        self._send(worker, lease)
        idle = sum(not worker.leases for worker in ready)
        if any(not worker.leases for worker in with_room) and not self._leases.has_more():
            for worker in ready:
                if idle > 0 and len(worker.leases) == LEASES_PER_WORKER and not worker.leases[-1].is_recalled:
                    worker.leases[-1].is_recalled = True
                    worker.call("recall", worker.leases[-1].number)
                    idle -= 1

    def _send(self, worker: WorkerHandle, lease: Lease) -> None:
        worker.leases.append(lease)
        lease.number, lease.is_recalled = worker.leases_given, False
        worker.leases_given += 1
        tasks = [
            replace(task, kept=task.kept if task.waiting else (), others=())
            for task in lease.tasks
            if task.open_queries
        ]
        self._when_done(worker.call("answer", lease.number, tasks), self._on_answered, worker, lease)

    def _find_store(self, tasks: list[DocumentTask]) -> str | None:
        """Return the store that has most of a group's prefixes."""
        stores = Counter(
            self._store_of_label.pop(label_number(task.label), None) for task in tasks if task.open_queries
        )
        del stores[None]
        return max(stores, key=lambda store: stores[store], default=None)

    def _finish_leases(self) -> Iterator[GroupResult]:
        """Let workers finish the lease that they work on."""
        for worker in self._pool.workers.values():
            worker.call("stop")
        while any(worker.leases for worker in self._pool.workers.values()):
            if (group := self._next_event()()) is not None:
                yield group

    # ---- replies of workers, handled in this thread

    def _when_done(self, future: Future[Any], handler: Callable[..., GroupResult | None], *arguments: Any) -> None:
        """Call a handler in this thread with the arguments and the future of a reply."""
        future.add_done_callback(lambda future: self._events.put(partial(handler, *arguments, future)))

    def _next_event(self) -> Callable[[], GroupResult | None]:
        if time.monotonic() - self._last_tokens > self._pool.seconds_between_counts:
            self._last_tokens = time.monotonic()
            for worker in self._pool.workers.values():
                if worker.leases:
                    self._when_done(worker.call("token_counts"), self._on_token_counts, worker)
        try:
            return self._events.get(timeout=_SECONDS_PER_WAIT)
        except Empty:
            self._context.observer.rows_done(0)  # shows that time has passed
            return lambda: None

    def _on_started(self, worker: WorkerHandle, future: Future[WorkerReply]) -> None:
        reply = self._reply_of(worker, future)
        if reply is None or reply.info is None:
            return
        info = reply.info
        worker.report = WorkerReport(info.host, info.pid, info.log)
        if self._devices and info.device not in self._devices:
            others = " and ".join(sorted(self._devices))
            _log.warning("workers compute on %s and on %s: answers may depend on which it was", others, info.device)
        self._devices.add(info.device)
        store = info.store or worker.name
        if store in self._known_stores:
            self._on_ready(worker, store)
        else:
            self._known_stores.add(store)
            self._when_done(worker.call("stored_labels"), self._on_stored_labels, worker, store)

    def _on_stored_labels(self, worker: WorkerHandle, store: str, future: Future[bytes]) -> None:
        with suppress(WorkerLost):
            labels = array("Q", worker.result(future))
            room = _MOST_LABELS - len(self._store_of_label)
            self._store_of_label.update((label, store) for label in labels[:room])
            self._leases.find_stores()
        if worker.name in self._pool.workers:
            self._on_ready(worker, store)

    def _on_ready(self, worker: WorkerHandle, store: str) -> None:
        worker.store, worker.ready_since = store, time.monotonic()
        self._stats.append(WorkStats(processes=self._pool.processes, workers=self._pool.reports(worker)))
        self._pool.note_ready(worker)
        self._leases.stores.add(store)

    def _on_answered(self, worker: WorkerHandle, lease: Lease, future: Future[WorkerReply]) -> GroupResult | None:
        reply = self._reply_of(worker, future)
        if reply is None:
            return None
        worker.leases.remove(lease)
        worker.count(reply)
        self._stats.append(replace(reply.stats, workers=self._pool.reports(worker)))
        self._show_tokens(worker, reply.tokens)
        if reply.results is None:
            self._leases.lose(lease, lease.store, None)
            return None
        self._leases.complete(lease)
        answered = iter(reply.results)
        results = []
        for task in lease.tasks:
            result = TaskResult.without_model(task)
            if task.open_queries:
                reply_result = next(answered)
                result = replace(reply_result, rows={**task.decided, **reply_result.rows})
            if result.own_keys and self._job.cache.keep == "job":
                self._worker_of_document[task.document_id] = worker, result.own_keys
            results.append(result)
        return self._counted(GroupResult(lease.tasks, results), shown=sum(len(each.rows) for each in reply.results))

    def _on_token_counts(self, worker: WorkerHandle, future: Future[TokenCounts]) -> None:
        with suppress(WorkerLost):  # the lease's own reply tells that the worker is lost
            self._show_tokens(worker, worker.result(future))

    def _show_tokens(self, worker: WorkerHandle, counts: TokenCounts) -> None:
        """Show the tokens and rows since the counts that came last. Replies may overtake each other."""
        shown, self._last_tokens = worker.shown, time.monotonic()
        if worker.name not in self._pool.workers or counts.changes <= shown.changes:
            return
        worker.shown = counts
        if prefilled := counts.prefilled - shown.prefilled:
            self._context.observer.prefill_advanced(prefilled)
        if restored := counts.restored - shown.restored:
            self._context.observer.restore_advanced(restored)
        if rows := counts.rows - shown.rows:
            self._context.observer.rows_done(rows)

    def _reply_of(self, worker: WorkerHandle, future: Future[WorkerReply]) -> WorkerReply | None:
        """Return a worker's reply and pass its log on; None if the worker is lost. Raises the error that it reports."""
        if worker.name not in self._pool.workers:
            return None
        try:
            reply: WorkerReply = worker.result(future)
        except WorkerLost as error:
            self._handle_death(worker, error)
            return None
        for line in reply.lines:
            logging.getLogger(line.logger).log(line.level, "%s: %s", worker.name, line.text)
        if reply.failed is not None:
            replace(reply.failed, message=f"worker {worker.name}: {reply.failed.message}").reraise()
        return reply

    def _handle_death(self, worker: WorkerHandle, error: WorkerLost) -> None:
        """Decide what happens to a lost worker's leases. A machine that is lost is not the documents' fault."""
        death = self._pool.remove(worker, error)
        in_hand = f", with {name_documents(worker.leases[0].documents)} in hand" if worker.leases else ""
        _log.warning("worker %s %s%s; its leases go to others", worker.name, death.cause, in_hand)
        self._context.observer.rows_done(worker.rows_answered - worker.shown.rows)  # the others are answered again
        lost = {} if worker.store is None else self._pool.reports(worker)
        lost = {name: replace(report, lost=True) for name, report in lost.items()}
        self._stats.append(WorkStats(restarts=1, workers=lost))
        while worker.leases:
            lease = worker.leases.pop()
            is_first = not worker.leases
            self._leases.lose(lease, worker.store, death.cause if is_first and not death.by_machine else None)
        self._leases.stores = {str(other.store) for other in self._pool.workers.values() if other.store}

    # ---- segments that are not needed any more

    def _drop(self, task: DocumentTask, result: TaskResult) -> None:
        worker, keys = self._worker_of_document.pop(task.document_id, (None, ()))
        if worker is not None and not self._pins.is_pinned(task.label):
            worker.call("drop", keys)

    def _drop_all(self) -> None:
        from pipeline.cache.store import open_store

        drop_segments(open_store(self._job.cache, self._pins.is_pinned), self._job)
        ready = [worker for worker in self._pool.workers.values() if worker.store]
        wait([worker.call("drop", None) for worker in ready], _SECONDS_FOR_DROPPING)

    def finish(self, done: bool) -> None:
        """End the run and the workers."""
        super().finish(done)
        self._pool.close()
