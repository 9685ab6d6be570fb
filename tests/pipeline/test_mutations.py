"""A few of the many spoilt stores that benches/mutate_store.py runs a job on."""

from __future__ import annotations

from pathlib import Path

from benches.mutate_store import WAYS, mutate


def test_a_spoilt_segment_is_never_loaded(tmp_path: Path) -> None:
    counts = mutate(4 * len(WAYS), 0, tmp_path)
    assert {outcome for _, outcome in counts} == {"rebuilt, reason logged"}, counts
    assert len(counts) == len(WAYS)
