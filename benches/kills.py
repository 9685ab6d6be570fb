"""Kills real runs at random moments, over and over, and counts what that costs.

    python -m benches.kills [--kills 200] [--seed 0] [--minutes 60] [--mode exact]

A job with a tiny model is run by the command line. At a random moment its process, or the process of the model, is
killed with SIGKILL; then the same command is given again, and killed again, until a run gets through. Then comes the
next job, of the next mode: exact, streaming, `keep: job`, a budget that not all segments fit into, and queries that use
answers. Moments are random within the seconds in which the job is worked on, and every fifth within the whole life of
the run. With `keep: job` and a budget, segments that are removed on purpose count as lost if they are built again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benches.tiny import QUERIES, Place, text_of

ROOT = Path(__file__).resolve().parent.parent
# The keys of a job in each mode.
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "streaming": {"cache": {"prefill": "streaming", "segment": 512}},
    "keep: job": {"cache": {"keep": "job"}},
    "budget": {"cache": {"budget": "1MB"}},  # less than all segments take, so some are removed and built again
    "chained": {
        "sections": {
            "queries": [
                {"id": "q0", "text": QUERIES[0]},
                {"id": "q1", "text": "Why {{ answers.q0 }}?", "when": "id != 'd3'"},
            ]
        }
    },
}
DOCUMENTS, SENTENCES = 6, 60
BUILT = re.compile(r"prefix (\w{12}) is built")
SECONDS_TO_START = 8.0


@dataclass
class Tally:
    """What kills have cost so far, in one mode."""

    kills: Counter[str] = field(default_factory=Counter)  # of the parent, of the child
    jobs: int = 0
    identical: int = 0
    rows_lost: int = 0
    rows_doubled: int = 0
    segments_lost: int = 0  # that were stored before a kill, and were built again after it
    prefilled_again: int = 0  # segments whose prefill was begun once more
    most_by_one_kill: int = 0  # of them


class Processes:
    """How runs are started, and which of their processes computes.

    seconds_of_work: in which the job is worked on, about.
    """

    seconds_of_work = 2.5

    def start(self, place: Place, log: int) -> subprocess.Popen[str]:
        """Start the command, with its output in the file of that descriptor."""
        command = [sys.executable, "-m", "pipeline.cli", "run", "--debug", str(place.folder / "job.yaml")]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment, text=True)

    def child_of(self, process: int) -> int | None:
        """The model's process: the child that was spawned to run multiprocessing's main, not the resource tracker."""
        found = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(process)], capture_output=True, text=True, check=False
        ).stdout
        children = [int(line.split()[0]) for line in found.splitlines() if "spawn_main" in line]
        return children[0] if children else None


class Mode:
    """Jobs of one mode, and the bytes that they are to give."""

    def __init__(self, folder: Path, model: Path, keys: dict[str, Any], processes: Processes) -> None:
        self.folder, self.model, self.keys, self.processes = folder, model, keys, processes
        self.tally = Tally()
        whole = self.place("whole")
        started = time.monotonic()
        _killed_run(whole, None, processes)
        self.seconds = time.monotonic() - started
        self.expected = whole.output.read_bytes()

    def place(self, name: str) -> Place:
        """A fresh folder with the job."""
        place = Place(self.folder / name, self.model, **self.keys)
        place.write({f"d{number}": text_of(number, SENTENCES) for number in range(DOCUMENTS)})
        return place


def kill_at_random(
    folder: Path,
    kills: int,
    seed: int,
    seconds: float = 3600.0,
    names: Sequence[str] = tuple(MODES),
    processes: Processes | None = None,
) -> dict[str, Tally]:
    """Kill so many runs, or as many as the seconds allow; what that cost, by mode."""
    processes = processes or Processes()
    rng, ends = random.Random(seed), time.monotonic() + seconds
    model = _forked_model(folder / "model")
    modes = {name: Mode(folder / name, model, MODES[name], processes) for name in names}
    done = 0
    while done < kills and time.monotonic() < ends:
        mode = list(modes.values())[sum(mode.tally.jobs for mode in modes.values()) % len(modes)]
        done += _kill_until_done(mode, rng, kills - done, ends)
    return {name: mode.tally for name, mode in modes.items()}


def _kill_until_done(mode: Mode, rng: random.Random, kills: int, ends: float) -> int:
    """Run one job until it is done, with at most so many kills; returns how many there were."""
    tally, place = mode.tally, mode.place(f"job{mode.tally.jobs}")
    done = 0
    built: set[str] = set()
    stored: set[str] = set()
    rows: set[tuple[str, str]] = set()
    finished = False
    while not finished:
        killer = _Killer(rng, mode) if done < kills and time.monotonic() < ends else None
        finished, log = _killed_run(place, killer, mode.processes)
        begun = BUILT.findall(log)
        by_this = len(begun) - len(set(begun))  # its process was started again within the run
        by_the_last = len(built & set(begun))
        built |= set(begun)
        tally.prefilled_again += by_this + by_the_last
        tally.most_by_one_kill = max(tally.most_by_one_kill, by_this, by_the_last)
        tally.segments_lost += len({key[:12] for key in stored} & set(begun))
        left = _rows(place)
        tally.rows_lost += len(rows - set(left))
        tally.rows_doubled += len(left) - len(set(left))
        stored, rows = place.segments(), set(left)
        if killer is not None and killer.victim:
            done += 1
            tally.kills[killer.victim] += 1
    expected = {(f"d{number}", f"q{query}") for number in range(DOCUMENTS) for query in range(len(QUERIES))}
    tally.rows_lost += len(expected - rows)
    tally.jobs += 1
    tally.identical += place.output.read_bytes() == mode.expected
    return done


class _Killer:
    """Picks a victim and a moment; ``victim`` says who was hit."""

    def __init__(self, rng: random.Random, mode: Mode) -> None:
        self._child_of = mode.processes.child_of
        self.child = rng.random() < 0.5
        self.from_start = rng.random() < 0.2
        self.delay = rng.uniform(0, mode.seconds if self.from_start else mode.processes.seconds_of_work)
        self.victim = ""

    def strike(self, process: subprocess.Popen[str], place: Place) -> None:
        """Wait for the moment, and kill."""
        if not self.from_start:
            lock = Path(f"{place.output}.lock")
            before = lock.stat().st_mtime_ns if lock.exists() else 0
            _wait_until(lambda: lock.exists() and lock.stat().st_mtime_ns != before, process)
        _wait_until(lambda: False, process, self.delay)
        victim = self._child_of(process.pid) if self.child else process.pid
        if process.poll() is None and victim is not None:
            os.kill(victim, signal.SIGKILL)
            self.victim = "child" if self.child else "parent"


def _wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str], seconds: float = SECONDS_TO_START) -> None:
    ends = time.monotonic() + seconds
    while not is_so() and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.005)


def _killed_run(place: Place, killer: _Killer | None, processes: Processes) -> tuple[bool, str]:
    """Run the job, killed by ``killer`` if there is one: whether it got to its end, and its log."""
    log = place.folder / "log"
    with log.open("w") as file:
        process = processes.start(place, file.fileno())
        if killer is not None:
            killer.strike(process, place)
        code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a run ended with exit code {code}:\n{log.read_text()}")
    return code == 0, log.read_text()


def _rows(place: Place) -> list[tuple[str, str]]:
    """The pairs committed: of the parts and, for documents that have none, of the finished file."""
    parts = [_pairs(file) for file in place.parts.glob("*/[!.]*.parquet")]
    pairs = [pair for part in parts for pair in part]
    documents = {document for document, _ in pairs}
    finished = _pairs(place.output) if place.output.exists() else []
    return pairs + [pair for pair in finished if pair[0] not in documents]


def _pairs(file: Path) -> list[tuple[str, str]]:
    columns = pq.read_table(file, columns=["document_id", "query_id"]).to_pydict()
    return list(zip(columns["document_id"], columns["query_id"], strict=True))


def _forked_model(folder: Path) -> Path:
    """Write the model in a process of its own, so that this one has nothing to do with MLX."""
    code = "import sys; from pathlib import Path; from benches.tiny import write_model; write_model(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT)
    return folder


def main() -> None:
    """Print a line of JSON for each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--mode", choices=MODES, action="append", help="of these modes only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds, names = arguments.minutes * 60, arguments.mode or list(MODES)
        tallies = kill_at_random(Path(folder), arguments.kills, arguments.seed, seconds, names)
    for name, tally in tallies.items():
        print(json.dumps({"mode": name, **vars(tally)}))


if __name__ == "__main__":
    main()
