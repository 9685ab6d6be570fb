"""Runs a job on a Ray cluster of three nodes on this machine, and kills a worker, a node or the driver meanwhile.

    python -m benches.ray_kills [--times 10] [--seed 0] [--job jobs/summarize.yaml] [--set ...]

The job is run by the command line on one machine first, and undisturbed on the cluster. Then, so many times each, with
an empty store, it is run and at a random moment of its work one of the three is killed; a driver's command is given
again. Each has to give the bytes of the first run, and no prefix that was in the store may be built again. A worker
computes with one thread, and so does the run on one machine: another number of threads rounds otherwise.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parent.parent
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
NODES = 3
KINDS = ("worker", "node", "driver")
SECONDS_TO_START = 120.0


@dataclass
class Tally:
    """What kills of one kind have cost."""

    runs: int = 0
    identical: int = 0
    rows_wrong: int = 0  # lost or doubled
    rebuilt: int = 0  # prefixes that were stored when something was killed
    seconds: list[float] = field(default_factory=list)


class Place:
    """A job with a store and a result of its own."""

    def __init__(self, folder: Path, job: Path, overrides: list[str], address: str = "") -> None:
        self.output, self.cache = folder / "out" / "answers.parquet", folder / "cache"
        paths = [f"output.path={self.output}", f"cache.dir={self.cache}", *overrides]
        self._command = [sys.executable, "-m", "pipeline.cli", "run", str(job), "--quiet"]
        self._command += [part for override in paths for part in ("--set", override)]
        self._environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if address:
            self._command += ["--on", "ray"]
            self._environment |= {"RAY_ADDRESS": address}

    def start(self) -> subprocess.Popen[str]:
        """The command, begun."""
        return subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True, env=self._environment, cwd=ROOT)

    def finish(self, process: subprocess.Popen[str]) -> bytes:
        """What it has written when it is done."""
        _, error = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"a run ended with exit code {process.returncode}:\n{error}")
        return self.output.read_bytes()

    def built(self) -> dict[str, str]:
        """When each segment of the store was built, by key."""
        manifests = {file.parent.name: json.loads(file.read_bytes()) for file in self.cache.glob("??/*/segment.json")}
        return {key: manifest["created"] for key, manifest in manifests.items()}

    def is_at_work(self) -> bool:
        """Whether workers have begun: the first prefix is being built, or is."""
        return any(self.cache.glob("locks/??.lock"))


class Bench:
    """A cluster, the job, and what it is to give."""

    def __init__(self, folder: Path, job: Path, overrides: list[str]) -> None:
        self.folder, self.job, self.overrides = folder, job, overrides
        self.cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        self.extra = [self.cluster.add_node(**NODE) for _ in range(NODES - 1)]
        alone = Place(folder / "alone", job, overrides)
        started = time.monotonic()
        self.expected = alone.finish(alone.start())
        self.seconds_alone = time.monotonic() - started
        pairs = pq.read_table(alone.output, columns=["document_id", "query_id"]).to_pylist()
        self.pairs = [(row["document_id"], row["query_id"]) for row in pairs]
        self.seconds = 0.0

    def undisturbed(self) -> bool:
        """Whether the cluster gives the same; measures how long it works."""
        place = Place(self.folder / "undisturbed", self.job, self.overrides, self.cluster.address)
        process = place.start()
        _wait_until(place.is_at_work, process)
        started = time.monotonic()
        same = place.finish(process) == self.expected
        self.seconds = time.monotonic() - started
        return same

    def kill(self, kind: str, number: int, rng: random.Random, tally: Tally) -> None:
        """One run, with one kill."""
        place = Place(self.folder / f"{kind}{number}", self.job, self.overrides, self.cluster.address)
        started = time.monotonic()
        process = place.start()
        _wait_until(place.is_at_work, process)
        _wait_until(lambda: False, process, rng.uniform(0, self.seconds))
        before = place.built()
        if process.poll() is None:
            self._strike(kind, process, rng)
        if kind == "driver":
            process.communicate()
            process = place.start()
        written = place.finish(process)
        after = place.built()
        tally.runs += 1
        tally.seconds.append(time.monotonic() - started)
        tally.identical += written == self.expected
        rows = pq.read_table(place.output, columns=["document_id", "query_id"]).to_pylist()
        tally.rows_wrong += [(row["document_id"], row["query_id"]) for row in rows] != self.pairs
        tally.rebuilt += sum(after.get(key) != created for key, created in before.items())
        while len(self.extra) < NODES - 1:
            self.extra.append(self.cluster.add_node(**NODE))

    def _strike(self, kind: str, process: subprocess.Popen[str], rng: random.Random) -> None:
        if kind == "driver":
            process.kill()
        elif kind == "node":
            self.cluster.remove_node(self.extra.pop(rng.randrange(len(self.extra))), allow_graceful=False)
        elif workers := self._workers():
            os.kill(rng.choice(workers), signal.SIGKILL)

    def _workers(self) -> list[int]:
        """The processes of the workers: children of the nodes' raylets."""
        raylets = [
            str(info.process.pid)
            for node in self.cluster.list_all_nodes()
            for name, found in node.all_processes.items()
            if name == "raylet"
            for info in found
        ]
        command = ["ps", "-o", "pid=,args=", "--ppid", ",".join(raylets)]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return [int(line.split()[0]) for line in listed.splitlines() if re.search(r"ray::\w*Worker", line)]


def _wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str], seconds: float = SECONDS_TO_START) -> None:
    ends = time.monotonic() + seconds
    while not is_so() and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.01)


def main() -> None:
    """Print a line of JSON for each kind of kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", type=Path, default=ROOT / "jobs" / "summarize.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of pipeline run")
    arguments = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    rng, tallies = random.Random(arguments.seed), {kind: Tally() for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.job, arguments.set)
        print(f"alone {bench.seconds_alone:.0f} s; undisturbed, the same bytes: {bench.undisturbed()}", end="")
        print(f", {bench.seconds:.0f} s of work", flush=True)
        for number in range(arguments.times):
            for kind, tally in tallies.items():
                bench.kill(kind, number, rng, tally)
                print(f"{kind} {number}: {tally}", flush=True)
        bench.cluster.shutdown()
    for kind, tally in tallies.items():
        print(json.dumps({"killed": kind, **vars(tally), "seconds": round(max(tally.seconds, default=0))}))


if __name__ == "__main__":
    main()
