"""A crew of workers on the machines of a Ray cluster, which answer a run's groups of documents as leases.

Ray carries leases and answers, and says who has died. Which group is next, and what becomes of one whose worker is
lost, is leases.py's; who works where is ray_pool.py's. Knows no models and no results.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.cache.hit_index import label_number
from pipeline.distributed.leases import Lease, Leases
from pipeline.distributed.ray_pool import LEASES, WorkerHandle, WorkerPool
from pipeline.distributed.ray_worker import Outcome, Told
from pipeline.errors import Interrupted, JobError, PipelineError, one_line
from pipeline.output.run_file import versions
from pipeline.report import WorkerReport
from pipeline.retry import named
from pipeline.run.executor import Executor, Run, drop_segments
from pipeline.run.supervisor import reraise
from pipeline.run.task import DocumentTask

_MOST_REMEMBERED = 1_000_000  # contexts of which it is known who has them
_SECONDS_PER_LOOK = 0.2
_SECONDS_FOR_DROPPING = 60.0
_log = logging.getLogger(__name__)


class RayExecutor(Executor):
    """As many workers as the cluster holds, or as the job's ``scale`` says. Ray is connected before."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._staff = WorkerPool(run.job)
        self._events: SimpleQueue[Callable[[], Sequence[DocumentTask] | None]] = SimpleQueue()  # from Ray's threads
        self._has_begun = False
        self._asked: set[str] = set()  # stores of which it is known what they have
        self._stored: dict[int, str] = {}  # the store that has a context, by its label's number
        self._own: dict[str, tuple[WorkerHandle | None, set[str]]] = {}  # segments to drop, by document
        self._devices: set[str] = set()

    def answered(self, groups: Iterator[list[DocumentTask]]) -> Generator[Sequence[DocumentTask]]:
        """The groups, as they are answered."""
        self._leases = leases = Leases(groups, self._where)
        while not leases.are_done:
            for group in leases.done():
                self._show(group)
                yield group
            try:
                self._run.check()
            except Interrupted:
                yield from self._wind_down()
                raise
            if leases.is_waiting:
                self._engage()
            self._hand_out()
            if (answered := self._next_event()()) is not None:
                yield answered

    def _show(self, group: Sequence[DocumentTask]) -> None:
        self._run.progress.rows_done(sum(len(todo.rows) for todo in group))

    def _next_event(self) -> Callable[[], Sequence[DocumentTask] | None]:
        try:
            return self._events.get(timeout=_SECONDS_PER_LOOK)
        except Empty:
            self._run.progress.rows_done(0)  # shows that time has passed
            return lambda: None

    def _engage(self) -> None:
        """Start workers where there is room for some."""
        run = self._run
        for member in self._staff.look():
            schemas = list(run.inputs.schemas)
            self._when_done(member.actor.start.remote(run.identity, versions(), schemas), self._is_ready, member)
        if not self._has_begun:
            self._has_begun = True
            self._pins.pin(self._labels_to_come())

    def _hand_out(self) -> None:
        """Give leases to those who have least to do, and let nobody wait for what somebody else has not begun."""
        ready = [member for member in self._staff.members.values() if member.store is not None]
        free = [member for member in ready if member.has_room]
        for at_work in range(LEASES):
            for member in free:
                if (
                    len(member.leases) == at_work
                    and member.has_room
                    and (lease := self._leases.take(str(member.store), not at_work))
                ):
                    self._send(member, lease)
        if any(not member.leases for member in free) and not self._leases.is_waiting:
            self._recall(ready)

    def _send(self, member: WorkerHandle, lease: Lease) -> None:
        member.leases.append(lease)
        lease.number, lease.is_recalled = member.handed, False
        member.handed += 1
        group = [replace(todo, kept=()) for todo in lease.group if todo.open]
        self._when_done(member.actor.answer.remote(lease.number, group), self._is_answered, member, lease)

    def _recall(self, ready: Sequence[WorkerHandle]) -> None:
        idle = sum(not member.leases for member in ready)
        for member in ready:
            if idle > 0 and len(member.leases) == LEASES and not member.leases[-1].is_recalled:
                member.leases[-1].is_recalled = True
                member.actor.leave.remote(member.leases[-1].number)
                idle -= 1

    def _when_done(self, reference: Any, then: Callable[..., Sequence[DocumentTask] | None], *arguments: Any) -> None:
        """Have something done in this thread with what a worker says."""
        reference.future().add_done_callback(lambda future: self._events.put(partial(then, *arguments, future)))

    def _is_ready(self, member: WorkerHandle, future: Future[Told]) -> None:
        told = self._told(member, future)
        if told is None or told.ready is None:
            return
        ready = told.ready
        member.about = WorkerReport(ready.host, ready.pid, ready.log)
        if self._devices and ready.device not in self._devices:
            others = " and ".join(sorted(self._devices))
            _log.warning("workers compute on %s and on %s: answers may depend on which it was", others, ready.device)
        self._devices.add(ready.device)
        store = ready.store or member.name
        if store in self._asked:
            self._has_come(member, store)
        else:
            self._asked.add(store)
            self._when_done(member.actor.stored.remote(), self._knows_stored, member, store)

    def _knows_stored(self, member: WorkerHandle, store: str, future: Future[bytes]) -> None:
        with suppress(RayError):
            labels = array("Q", future.result())
            self._stored.update((label, store) for label in labels[: _MOST_REMEMBERED - len(self._stored)])
            self._leases.look_again()
        if member.name in self._staff.members:
            self._has_come(member, store)

    def _has_come(self, member: WorkerHandle, store: str) -> None:
        member.store, member.since = store, time.monotonic()
        self._run.report.workers[member.name] = member.about
        self._staff.is_ready(member)
        self._leases.stores.add(store)

    def _where(self, group: list[DocumentTask]) -> str | None:
        """The store that has most of a group's prefixes."""
        stores = Counter(self._stored.pop(label_number(todo.label), None) for todo in group if todo.open)
        del stores[None]
        return max(stores, key=lambda store: stores[store], default=None)

    def _is_answered(self, member: WorkerHandle, lease: Lease, future: Future[Told]) -> Sequence[DocumentTask] | None:
        told = self._told(member, future)
        if told is None:
            return None
        member.leases.remove(lease)
        self._count(member, told)
        if told.outcomes is None:
            self._leases.lose(lease, lease.store, None)
            return None
        self._leases.give_back(lease)
        self._take_in(lease, member, told.outcomes)
        return lease.group

    def _take_in(self, lease: Lease, member: WorkerHandle, outcomes: Sequence[Outcome]) -> None:
        for todo, outcome in zip([todo for todo in lease.group if todo.open], outcomes, strict=True):
            todo.rows |= outcome.rows
            todo.truncated, todo.split = outcome.truncated, outcome.split
            if outcome.keys:
                self._own[todo.document_id] = member, outcome.keys
        self._show(lease.group)

    def _count(self, member: WorkerHandle, told: Told) -> None:
        report = max(told.report, member.report, key=lambda report: report.answer_seconds)  # one may overtake another
        seconds = max(time.monotonic() - member.since, 1e-9)
        outcomes = told.outcomes or ()
        documents = member.about.documents + len(outcomes)
        answers = member.about.answers + sum(len(outcome.rows) for outcome in outcomes)
        self._run.report.add_growth(member.report, report)
        self._run.progress.prefilled(report.prefilled_tokens - member.report.prefilled_tokens)
        member.report = report
        member.about = replace(
            member.about,
            documents=documents,
            answers=answers,
            prefilled_tokens=report.prefilled_tokens,
            documents_per_second=documents / seconds,
            answers_per_second=answers / seconds,
            prefill_tokens_per_second=report.prefilled_tokens / max(report.prefill_seconds, 1e-9),
        )
        self._run.report.workers[member.name] = member.about

    def _told(self, member: WorkerHandle, future: Future[Told]) -> Told | None:
        """What a worker says, its log passed on; None where it is lost. Raises what it failed at."""
        if member.name not in self._staff.members:
            return None
        try:
            told = future.result()
        except RayTaskError as error:
            raise PipelineError(f"worker {member.name}: {one_line(error)}") from error
        except RayError as error:
            if getattr(error, "actor_init_failed", False):
                why = str(error).strip().splitlines()[-1]
                raise JobError(
                    f"worker {member.name} cannot be started; install the same packages there: {why}"
                ) from None
            self._bury(member, error)
            return None
        for line in told.lines:
            logging.getLogger(line.logger).log(line.level, "%s: %s", member.name, line.text)
        if told.failed is not None:
            reraise(replace(told.failed, message=f"worker {member.name}: {told.failed.message}"))
        return told

    def _bury(self, member: WorkerHandle, error: RayError) -> None:
        """Decide what becomes of what a lost worker had in hand; a machine that goes is not the document's fault."""
        is_there = self._staff.lose(member)
        cause = f"died on {member.machine.host}" if is_there else "was lost with its machine"
        in_hand = f", with {named(member.leases[0].documents)} in hand" if member.leases else ""
        _log.warning("worker %s %s%s; its leases go to others", member.name, cause, in_hand)
        _log.debug("worker %s: %s", member.name, one_line(error))
        self._run.report.restarts += 1
        if member.store is not None:
            self._run.report.workers[member.name] = replace(member.about, lost=True)
        while member.leases:
            lease = member.leases.pop()
            self._leases.lose(lease, member.store, cause if is_there and not member.leases else None)
        self._leases.stores = {str(other.store) for other in self._staff.members.values() if other.store}

    def _wind_down(self) -> Iterator[Sequence[DocumentTask]]:
        """Have those at work finish what they have in hand."""
        for member in self._staff.members.values():
            member.actor.stop.remote()
        while any(member.leases for member in self._staff.members.values()):
            if (group := self._next_event()()) is not None:
                yield group

    @property
    def _is_loaded(self) -> bool:
        return self._has_begun

    def _drop(self, todo: DocumentTask) -> None:
        member, keys = self._own.pop(todo.document_id, (None, set()))
        if member is not None and not self._pins.is_pinned(todo.label):
            member.actor.drop.remote(keys)

    def _drop_all(self) -> None:
        from pipeline.cache.store import open_store

        drop_segments(open_store(self._run.job.cache, self._pins.is_pinned), self._run.job)
        dropped = [member.actor.drop.remote(None) for member in self._staff.members.values() if member.store]
        with suppress(RayError):
            ray.get(dropped, timeout=_SECONDS_FOR_DROPPING)
