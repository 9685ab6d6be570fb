"""Which group of documents is handed to which worker next, and what becomes of one whose worker is lost.

A group is handed out as a lease, which a worker either gives back answered or loses with its life. Knows groups, stores
by their names and a clock; nothing of machines, models or what becomes of rows.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.errors import ModelProcessDied
from pipeline.retry import DEATHS, named, twice_died
from pipeline.run.task import DocumentTask

PATIENCE = 1.0  # seconds that a worker with nothing to do waits for documents whose prefixes are not elsewhere
_LOOKAHEAD = 16  # groups among which there is a choice
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Lease:
    """A group to be answered by one worker.

    store: which has its prefixes, as far as is known. number: its worker's count of leases. is_recalled: its worker is
    asked not to begin with it. is_suspect: a worker may have died of it, so the next has nothing else in hand, or the
    blame might be another's.
    """

    group: list[DocumentTask]
    store: str | None = None
    number: int = 0
    is_recalled: bool = False
    is_suspect: bool = False
    waiting_since: float = field(default_factory=time.monotonic)

    @property
    def documents(self) -> tuple[str, ...]:
        """The ids of the documents of which something is left to answer."""
        return tuple(todo.document_id for todo in self.group if todo.open)


class Leases:
    """The groups of a run as leases, in their order as far as stores and losses allow.

    ``where`` names the store that has a group's prefixes, or None. Set ``stores`` to those that workers have.
    """

    def __init__(self, groups: Iterator[list[DocumentTask]], where: Callable[[list[DocumentTask]], str | None]) -> None:
        self._groups, self._where = groups, where
        self.stores: set[str] = set()
        self._waiting: deque[Lease] = deque()
        self._done: deque[list[DocumentTask]] = deque()  # in which there is nothing left to answer
        self._deaths: Counter[tuple[str, ...]] = Counter()
        self._out = 0
        self._is_over = False

    @property
    def is_waiting(self) -> bool:
        """Whether there is something for a worker to do."""
        self._fill(1)
        return bool(self._waiting)

    @property
    def are_done(self) -> bool:
        """Whether all groups are answered."""
        return not (self.is_waiting or self._out or self._done)

    def done(self) -> Iterator[list[DocumentTask]]:
        """The groups of which nothing is left to answer, without a worker."""
        self._fill(1)
        while self._done:
            yield self._done.popleft()
            self._fill(1)

    def take(self, store: str, is_idle: bool) -> Lease | None:
        """The next for a worker of that store; one that is idle gets, after a while, what is better off elsewhere."""
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
            self._out += 1
        return lease

    def look_again(self) -> None:
        """More is known of where prefixes are."""
        for lease in self._waiting:
            lease.store = lease.store or self._where(lease.group)

    def give_back(self, lease: Lease) -> None:
        """It is answered."""
        self._out -= 1
        self._deaths.pop(lease.documents, None)

    def lose(self, lease: Lease, store: str | None, cause: str | None) -> None:
        """It was not answered, and its prefixes may be in ``store``; it is the next that is handed out.

        cause: what happened to its worker where its documents may be to blame. Those in whose hands two workers died
        are tried one by one, and one by itself ends as errors.
        """
        self._out -= 1
        documents = lease.documents
        lease.store, lease.waiting_since = store, time.monotonic()
        if cause is not None:
            self._deaths[documents] += 1
            lease.is_suspect = True
        if self._deaths[documents] < DEATHS:
            self._waiting.appendleft(lease)
        elif len(documents) > 1:
            _log.warning("a worker %s, with %s in hand again; each is tried by itself", cause, named(documents))
            self._waiting.extendleft(
                Lease([todo], store, is_suspect=True) for todo in reversed(lease.group) if todo.open
            )
            self._done.extend([todo] for todo in lease.group if not todo.open)
        else:
            _log.warning("a worker %s, with %s in hand again; its rows become errors", cause, named(documents))
            for todo in lease.group:
                todo.fail(ModelProcessDied(twice_died(f"{cause}")))
            self._done.append(lease.group)

    def _fill(self, count: int) -> None:
        """Have so many groups waiting, if there are; it ends early where one is done already."""
        while len(self._waiting) < count and not self._done and not self._is_over:
            group = next(self._groups, None)
            if group is None:
                self._is_over = True
            elif any(todo.open for todo in group):
                self._waiting.append(Lease(group, self._where(group)))
            else:
                self._done.append(group)
