"""The work of ``pipeline cache``: list a store's entries, verify them, remove some of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.cache.entries import REJECTED, Entry, list_buckets, list_keys, size_of
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
    """Yield all segments of a store in the order of their keys, the rejected ones first. Raises StoreError."""
    now, pins = time.time(), Pins(folder)
    for entry in Store(folder, read_only=True).entries():
        yield ListedSegment(
            key=entry.key,
            tokens=entry.tokens,
            bytes=entry.bytes,
            age=_age(entry.created, now),
            unused_for=_age(entry.used, now),
            model=entry.model,
            document=entry.document,
            codec=entry.codec,
            needed=pins.is_pinned(entry.label),
            problem=entry.problem or None,
        )


def verify_store(folder: Path) -> VerifyReport:
    """Read every byte of a store and compare checksums. Bad segments are moved aside; the next run rebuilds them.

    Runs may use the store meanwhile: a segment that looks bad is read again while no run writes. Raises StoreError if a
    file cannot be read, which does not make its segment bad.
    """
    store, bad = Store(folder), {}
    good = size = 0
    try:
        for bucket, _ in sorted(list_buckets(folder)):
            for key in sorted(list_keys(folder, bucket)):
                path = folder / bucket / key
                size += size_of(path)
                if bucket == REJECTED:
                    continue
                verify = partial(verify_segment, path, key, folder)
                try:
                    try:
                        verify()
                    except SegmentError:
                        if store.read_again(key, verify) is None:
                            continue
                except SegmentError as error:
                    bad[key] = str(error)
                else:
                    good += 1
    except OSError as error:
        raise StoreError(f"{folder}: cannot be read: {one_line(error)}") from error
    return VerifyReport(good, size, bad)


def clean_store(folder: Path, budget: int | None, unused_for: float | None, dry_run: bool) -> CleanupReport:
    """Remove segments that cannot be used, then old ones, then more until the store fits into its budget.

    budget: the most bytes that the store may hold. unused_for: remove segments that were last used more than this many
    seconds ago. dry_run: only report. Segments that an unfinished job has pinned are kept. Raises StoreError if a
    segment cannot be removed.
    """
    pins, now = Pins(folder), time.time()
    store = Store(folder, is_needed=pins.is_pinned, read_only=dry_run)
    used = store.used_bytes()

    def choose(entry: Entry, used: int) -> str | None:
        if entry.problem:
            return "of no use"
        if unused_for is not None and now - entry.used > unused_for:
            return "not used for long"
        return "over the budget" if budget is not None and used > budget else None

    removed, left = store.clean(choose, dry_run)
    reasons = Counter(reason for _, reason in removed)
    removed_bytes = sum(entry.bytes for entry, _ in removed)
    return CleanupReport(len(removed), removed_bytes, left, used - removed_bytes, dict(reasons))


def _age(moment: float, now: float) -> float | None:
    return max(0.0, now - moment) if moment else None
