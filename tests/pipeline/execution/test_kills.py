"""A few of the many random kills of whole runs that benches/kills.py does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benches.kills import kill_at_random


@pytest.mark.skipif(sys.platform != "linux", reason="the model's process is found as ps of Linux tells it")
def test_random_kills_cost_only_what_was_in_flight(tmp_path: Path) -> None:
    tallies = kill_at_random(tmp_path, kills=6, seed=0, names=["exact", "streaming", "chained"])
    assert sum(tally.kills.total() for tally in tallies.values()) == 6
    for name, tally in tallies.items():
        assert tally.jobs, name
        assert tally.identical == tally.jobs, name
        assert (tally.lost, tally.duplicated, tally.lost_segments) == (0, 0, 0), name
        assert tally.most_again <= 1, name
