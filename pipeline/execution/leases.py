"""Leases: which group of documents goes to which worker next, and what happens to groups whose worker is lost.

A worker either returns a lease answered or loses it when it dies. To this module a store is only a name. Machines,
models and rows are handled elsewhere.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.errors import ModelProcessDied, RowError
from pipeline.execution.quarantine import Quarantine, Verdict, name_documents, quarantine_error
from pipeline.execution.task import DocumentTask

PATIENCE = 1.0  # seconds that an idle worker waits before it takes documents whose prefixes another worker has
_LOOKAHEAD = 16  # groups from which a worker's next one is chosen
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Lease:
    """A group to be answered by one worker.

    store: the store that has its prefixes, if known. number: the worker's count of leases. is_recalled: the worker is
    asked not to start it. is_suspect: a worker may have died of it, so the next worker gets it alone; otherwise another
    lease might be blamed.
    """

    tasks: list[DocumentTask]
    store: str | None = None
    number: int = 0
    is_recalled: bool = False
    is_suspect: bool = False
    waiting_since: float = field(default_factory=time.monotonic)

    @property
    def documents(self) -> tuple[str, ...]:
        """The ids of the documents with open queries."""
        return tuple(task.document_id for task in self.tasks if task.open_queries)


class Leases:
    """The groups of a run as leases, in their order as far as stores and losses allow.

    find_store: returns the store that has a group's prefixes, or None. give_up: returns a task in which what was open
    has an error. Set ``stores`` to the stores of living workers.
    """

    def __init__(
        self,
        groups: Iterator[list[DocumentTask]],
        find_store: Callable[[list[DocumentTask]], str | None],
        give_up: Callable[[DocumentTask, RowError], DocumentTask],
    ) -> None:
        self._groups, self._find_store, self._give_up = groups, find_store, give_up
        self.stores: set[str] = set()
        self._waiting: deque[Lease] = deque()
        self._done: deque[list[DocumentTask]] = deque()  # groups without open queries
        self._quarantine = Quarantine()
        self._leased = 0
        self._is_exhausted = False

    def has_more(self) -> bool:
        """Return whether there is something for a worker to do. If none waits, the input is read, which may block."""
        self._fill(1)
        return bool(self._waiting)

    def are_done(self) -> bool:
        """Return whether all groups are answered. The input may be read, which may block."""
        return not (self.has_more() or self._leased or self._done)

    def take_done(self) -> Iterator[list[DocumentTask]]:
        """Yield the groups that need no worker, since they have no open queries."""
        self._fill(1)
        while self._done:
            yield self._done.popleft()
            self._fill(1)

    def take(self, store: str, is_idle: bool) -> Lease | None:
        """Return the next lease for a worker of a store. After a while an idle worker gets other stores' documents."""
        self._fill(_LOOKAHEAD)
        if not is_idle and any(lease.is_suspect for lease in self._waiting):
            return None
        lease = next((lease for lease in self._waiting if lease.store == store), None)
        if lease is None:
            lease = next((lease for lease in self._waiting if lease.store not in self.stores), None)
        if lease is None and is_idle and self._waiting:
            oldest = self._waiting[0]
            lease = oldest if time.monotonic() - oldest.waiting_since > PATIENCE else None
        if lease is not None:
            self._waiting.remove(lease)
            self._leased += 1
        return lease

    def find_stores(self) -> None:
        """Look for the stores of waiting leases again, since more is known about stores now."""
        for lease in self._waiting:
            lease.store = lease.store or self._find_store(lease.tasks)

    def complete(self, lease: Lease) -> None:
        """Note that a lease is answered."""
        self._leased -= 1
        self._quarantine.forget(lease.documents)

    def lose(self, lease: Lease, store: str | None, cause: str | None) -> None:
        """Note that a lease was not answered. It is the next that is handed out, unless it is quarantined.

        store: where its prefixes may be. cause: what happened to its worker, if its documents may be to blame; see
        quarantine.py for what follows.
        """
        self._leased -= 1
        documents = lease.documents
        lease.store, lease.waiting_since = store, time.monotonic()
        verdict = self._quarantine.verdict(documents) if cause is None else self._quarantine.record_death(documents)
        lease.is_suspect |= cause is not None
        if verdict is Verdict.RETRY:
            self._waiting.appendleft(lease)
        elif verdict is Verdict.SEPARATE:
            text = "a worker %s, with %s in hand again; each is tried by itself"
            _log.warning(text, cause, name_documents(documents))
            self._waiting.extendleft(
                Lease([task], store, is_suspect=True) for task in reversed(lease.tasks) if task.open_queries
            )
            self._done.extend([task] for task in lease.tasks if not task.open_queries)
        else:
            text = "a worker %s, with %s in hand again; its rows become errors"
            _log.warning(text, cause, name_documents(documents))
            error = ModelProcessDied(quarantine_error(f"{cause}"))
            self._done.append([self._give_up(task, error) for task in lease.tasks])

    def _fill(self, count: int) -> None:
        """Read groups until ``count`` leases wait, if there are as many. Stop at a group without open queries."""
        while len(self._waiting) < count and not self._done and not self._is_exhausted:
            tasks = next(self._groups, None)
            if tasks is None:
                self._is_exhausted = True
            elif any(task.open_queries for task in tasks):
                self._waiting.append(Lease(tasks, self._find_store(tasks)))
            else:
                self._done.append(tasks)
