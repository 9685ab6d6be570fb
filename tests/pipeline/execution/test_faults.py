"""A run killed with SIGKILL at its steps: what is left is never half read, and the next run makes the same of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT, warm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="steps are watched through /proc")
STREAMING = ["cache.prefill=streaming", "cache.segment=512"]


def killed_at_steps(model: Path, folder: Path, every: int, overrides: list[str]) -> tuple[Any, list[Any]]:
    """What steps.py tells of the undisturbed run and of those that were killed and resumed."""
    command = [sys.executable, str(Path(__file__).parents[1] / "steps.py"), str(model), str(folder), str(every)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = warm.run([*command, *overrides], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    whole, *killed = map(json.loads, done.stdout.splitlines())
    return whole, killed


# All steps of the first; of the others a sample, since a run takes most of a second.
@pytest.mark.parametrize(
    ("every", "overrides", "steps", "segments"),
    [
        (1, [], 45, 2),
        (12, STREAMING, 80, 6),
        (9, ["cache.budget=100000"], 45, 1),
        (13, [*STREAMING, "cache.keep=job", "cache.budget=300000", "generation.batch_size=2"], 80, 0),
    ],
    ids=["exact", "streaming", "exact in a budget", "streaming in a budget"],
)
def test_a_run_killed_at_any_step_is_resumed(
    tiny_model: Path, tmp_path: Path, every: int, overrides: list[str], steps: int, segments: int
) -> None:
    whole, killed = killed_at_steps(tiny_model, tmp_path, every, overrides)
    assert len(whole["steps"]) >= steps, whole["steps"]
    assert len(whole["segments"]) == segments
    assert len(killed) == len(range(0, len(whole["steps"]), every))
    for told in killed:
        step = told["step"]
        assert told["bytes"] == whole["bytes"], step
        assert told["segments"] == whole["segments"], step
        assert told["kept"] == told["committed"], step  # no row that was there is answered again
        assert told["kept"] + told["answered"] == 4, step
        assert told["again"] <= 1, step  # the segment in flight
        assert (told["failed"], told["leftovers"]) == (0, []), step
