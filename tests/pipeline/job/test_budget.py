"""Budgets as people write them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.job.budget import budget_bytes, checked_budget


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("20GB", 20 * 10**9),
        ("20 GB", 20 * 10**9),
        ("1.5GiB", 3 << 29),
        ("500M", 500 * 10**6),
        ("500MiB", 500 << 20),
        ("2kB", 2000),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("2ki", 2048),
        ("1T", 10**12),
    ],
)
def test_sizes(said: int | str, expected: int) -> None:
    assert checked_budget(said) == said
    assert budget_bytes(said, Path("/")) == expected


def test_a_share_of_the_disk(tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    assert budget_bytes("10%", tmp_path / "not" / "there" / "yet") == int(0.1 * total)
    assert budget_bytes("100%", tmp_path) == total


@pytest.mark.parametrize("said", [0, -5, "", "GB", "0", "0GB", "-1GB", "101%", "20 XB", "20GBs", "1e9", "ten", "5%GB"])
def test_what_is_no_size(said: int | str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 20GB, 500MiB or 10%"):
        checked_budget(said)
