"""The work of ``pipeline cache``: list a store's entries, verify them, remove some of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.cache.entries import REJECTED, Entry, eviction_order
from pipeline.cache.pins import Pins
from pipeline.cache.store import Store
from pipeline.errors import StoreError, one_line
from turboquant.io.segment_file import SegmentError, verify_segment

DAY = 24 * 3600


@dataclass(frozen=True)
class ListedSegment:
    """One segment as ``pipeline cache ls`` shows it.

    age, unused_for: seconds since it was built and since it was last used; None if unknown. needed: whether an
    unfinished job has pinned it. problem: the reason why it cannot be used, or None.
    """

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
class VerifyReport:
    """Result of a verification: the number of good segments, the bytes read, and for each bad key the reason."""

    good: int
    bytes: int
    bad: dict[str, str]


@dataclass(frozen=True)
class CleanupReport:
    """Result of a cleanup or of its dry run: segments and bytes that are removed and that are left.

    reasons: number of removed segments for each reason.
    """

    removed: int
    removed_bytes: int
    left: int
    left_bytes: int
    reasons: dict[str, int]


def list_store(folder: Path) -> Iterator[ListedSegment]:
    """Yield all segments of a store in the order of their keys, the rejected ones first."""
    now, pins = time.time(), Pins(folder)
    for entry in Store(folder).entries():
        manifest = entry.manifest or {}
        identity = manifest.get("identity", {})
        yield ListedSegment(
            key=entry.key,
            tokens=entry.tokens,
            bytes=entry.bytes,
            age=_age(entry.created, now),
            unused_for=_age(entry.used, now),
            model=str(entry.metadata.get("model", "")),
            document=str(entry.metadata.get("document", "")),
            codec=str(identity.get("codec", "")),
            needed=pins.is_pinned(entry.label),
            problem=entry.problem,
        )


def verify_store(folder: Path) -> VerifyReport:
    """Read every byte of a store and compare checksums. Bad segments are moved aside; the next run rebuilds them.

    Runs may use the store meanwhile: a segment that looks bad is read again while no run writes. Raises StoreError if a
    file cannot be read, which does not make its segment bad.
    """
    store, bad = Store(folder), {}
    good = size = 0
    for entry in store.entries():
        size += entry.bytes
        if entry.folder.parent.name == REJECTED:
            continue
        verify = partial(verify_segment, entry.folder, entry.key)
        try:
            try:
                verify()
            except SegmentError:
                if store.read_again(entry.key, verify) is None:
                    continue
        except SegmentError as error:
            bad[entry.key] = str(error)
        except OSError as error:
            raise StoreError(f"{entry.folder}: cannot be read: {one_line(error)}") from error
        else:
            good += 1
    return VerifyReport(good, size, bad)


def clean_store(folder: Path, budget: int | None, unused_for: float | None, dry_run: bool) -> CleanupReport:
    """Remove segments that cannot be used, then old ones, then more until the store fits into its budget.

    budget: the most bytes that the store may hold. unused_for: remove segments that were last used more than this many
    seconds ago. dry_run: only report. Segments that an unfinished job has pinned are kept. Raises StoreError if a
    segment cannot be removed.
    """
    pins, store = Pins(folder), Store(folder)
    with store.write_lock():
        entries = list(store.entries())
        used, now = store.used_bytes(), time.time()
        left, reasons, chosen = used, dict[str, int](), list[Entry]()
        for entry in eviction_order(entries, lambda entry: pins.is_pinned(entry.label)):
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
    return CleanupReport(len(chosen), used - left, len(entries) - len(chosen), left, reasons)


def _age(moment: float | None, now: float) -> float | None:
    return max(0.0, now - moment) if moment else None
