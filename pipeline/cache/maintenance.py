"""Looking after a store by hand: list it, verify it, shrink it.

Knows what ``pipeline cache`` shows and does; what may go first is entries.py's to say, and what is needed pins.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.entries import REJECTED, Entry, eviction_order
from pipeline.cache.pins import Pins
from pipeline.cache.store import Store
from turboquant.io.segment_file import SegmentError, verify_segment

DAY = 24 * 3600


@dataclass(frozen=True)
class Listed:
    """One segment as a person would look at it. Ages are in seconds; ``problem`` says why it is of no use."""

    key: str
    tokens: int
    bytes: int
    age: float | None
    unused_for: float | None
    model: str
    document: str
    codec: str
    needed: bool
    problem: str | None


@dataclass(frozen=True)
class Checked:
    """What a verification found; ``bad`` maps keys to reasons."""

    good: int
    bytes: int
    bad: dict[str, str]


@dataclass(frozen=True)
class Collected:
    """What was, or would be, removed and what is left, in segments and bytes. ``reasons`` counts by reason."""

    removed: int
    removed_bytes: int
    left: int
    left_bytes: int
    reasons: dict[str, int]


def list_store(folder: Path) -> Iterator[Listed]:
    """Everything in a store, by key."""
    now, needs = time.time(), Pins(folder)
    for entry in Store(folder).entries():
        manifest = entry.manifest or {}
        identity = manifest.get("identity", {})
        yield Listed(
            key=entry.key,
            tokens=entry.tokens,
            bytes=entry.bytes,
            age=_age(entry.created, now),
            unused_for=_age(entry.used, now),
            model=str(entry.about.get("model", "")),
            document=str(entry.about.get("document", "")),
            codec=str(identity.get("codec", "")),
            needed=needs.wants(entry.label),
            problem=entry.problem,
        )


def verify_store(folder: Path, on_entry: Callable[[Entry], None] = lambda entry: None) -> Checked:
    """Read every byte; what is bad is set aside, to be built again when it is wanted."""
    store, bad = Store(folder), {}
    good = size = 0
    for entry in store.entries():
        on_entry(entry)
        size += entry.bytes
        if entry.folder.parent.name == REJECTED:
            continue
        try:
            if entry.problem is not None:
                raise SegmentError(entry.problem)
            verify_segment(entry.folder, entry.key)
        except SegmentError as error:
            bad[entry.key] = str(error)
            store.reject(entry.key, str(error))
        else:
            good += 1
    return Checked(good, size, bad)


def collect(folder: Path, budget: int | None, unused_for: float | None, dry_run: bool) -> Collected:
    """Remove what is of no use, what was not used for so many seconds, and then until the store fits into a budget.

    What an unfinished job needs stays. Raises StoreError where the folder refuses.
    """
    needs, store = Pins(folder), Store(folder)
    with store.changing():
        entries = list(store.entries())
        used, now = store.used_bytes(), time.time()
        left, reasons, chosen = used, dict[str, int](), list[Entry]()
        for entry in eviction_order(entries, lambda entry: needs.wants(entry.label)):
            if entry.problem is not None:
                reason = "of no use"
            elif unused_for is not None and now - entry.used > unused_for:
                reason = "not used for long"
            elif budget is not None and left > budget:
                reason = "over the budget"
            else:
                continue
            chosen.append(entry)
            left -= entry.bytes
            reasons[reason] = reasons.get(reason, 0) + 1
        if not dry_run:
            store.remove(chosen)
    return Collected(len(chosen), used - left, len(entries) - len(chosen), left, reasons)


def _age(moment: float | None, now: float) -> float | None:
    return max(0.0, now - moment) if moment else None
