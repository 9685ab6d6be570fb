"""A few of the many random kills of whole runs that benches/kills.py does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benches.kills import Processes, kill_at_random
from benches.tiny import Place
from tests import warm


class WarmProcesses(Processes):
    """Processes that have imported everything, so that little of a run is its start."""

    seconds_of_work = 0.8

    def start(self, place: Place, log: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline.cli", "run", "--debug", place.folder / "job.yaml"]
        return warm.Popen(command, stdout=log, stderr=log, text=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})

    def child_of(self, process: int) -> int | None:
        """The model's process: the child that was forked last. The first one forks the others."""
        listed = ["ps", "-o", "pid=,args=", "--sort=start_time", "--ppid", str(process)]
        found = subprocess.run(listed, capture_output=True, text=True, check=False).stdout
        forked = [int(line.split()[0]) for line in found.splitlines() if "tests.warm" in line]
        return forked[-1] if len(forked) > 1 else None


@pytest.mark.skipif(sys.platform != "linux", reason="the model's process is found as ps of Linux tells it")
def test_random_kills_cost_only_what_was_in_flight(tmp_path: Path) -> None:
    tallies = kill_at_random(tmp_path, 6, seed=0, names=["exact", "streaming", "chained"], processes=WarmProcesses())
    assert sum(tally.kills.total() for tally in tallies.values()) == 6
    for name, tally in tallies.items():
        assert tally.jobs, name
        assert tally.identical == tally.jobs, name
        assert (tally.rows_lost, tally.rows_doubled, tally.segments_lost) == (0, 0, 0), name
        assert tally.most_by_one_kill <= 1, name
