"""A few of the many damaged stores and job files that benches/mutate_store*.py and benches/fuzz_jobs.py try."""

from __future__ import annotations

from pathlib import Path

from benches.fuzz_jobs import fuzz
from benches.mutate_store import MODES, WAYS, mutate
from benches.mutate_store_files import KINDS
from benches.mutate_store_files import mutate as mutate_files


def test_a_damaged_segment_is_never_loaded(tmp_path: Path) -> None:
    counts = mutate(len(MODES) * len(WAYS), 0, tmp_path)
    assert {outcome for _, outcome in counts} == {"rebuilt, reason logged"}, counts
    assert len(counts) == len(WAYS)


def test_no_damaged_file_of_a_store_ends_a_command(tmp_path: Path) -> None:
    counts = mutate_files(15, 0, tmp_path, list(KINDS))
    assert counts == {(kind, "used"): 15 for kind in KINDS}


def test_a_damaged_job_file_is_refused_with_one_line(tmp_path: Path) -> None:
    counts = fuzz(100, 0, tmp_path)
    assert not set(counts) - {"planned", "refused", "run"}, counts
    assert counts["refused"] > 50
    assert counts["run"] > 0
