"""What handing out documents costs: a run on Ray whose workers only wait, or answer at once.

    python -m benches.ray_overhead efficiency [--latency 0.25] [--workers 1 2 4 8] [--documents 40]
    python -m benches.ray_overhead driver [--documents 1000 10000 100000]
    python -m benches.ray_overhead data [--documents 2000]

efficiency: documents a second of some workers with a model of fixed latency, by that of one, each given as many.
driver: what the driver takes for a document whose answers cost nothing, in wall and CPU time, and its memory.
data: the same documents through an actor pool of Ray Data and through plain actors, with nothing else around them.
Each is done in a process of its own, on a cluster of this machine that has a CPU a worker, in name.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benches.tiny import SCHEMA, Place, write_model
from pipeline.progress import RunObserver
from turboquant.runtime.blas import load_tuned_blas

ROOT = Path(__file__).resolve().parent.parent
QUERIES = 4
CHARACTERS = 8000


def place(folder: Path, documents: int, workers: int) -> Place:
    """A job of so many documents, each of which is a lease."""
    given = Place(folder, write_model(folder / "model"))
    queries = [{"id": f"q{number}", "text": f"What is said of {number}?"} for number in range(QUERIES)]
    given.sections = {"queries": queries, "generation": {"batch_size": QUERIES}, "scale": {"workers": workers}}
    given.sections["scale"]["num_cpus"] = 1
    given.write()
    text = ("The board met on the third of May and decided the budget. " * CHARACTERS)[:CHARACTERS]
    with pq.ParquetWriter(folder / "documents.parquet", SCHEMA) as file:
        for start in range(0, documents, 1000):
            numbers = range(start, min(start + 1000, documents))
            rows = {"id": [f"d{number}" for number in numbers], "text": [f"{number} {text}" for number in numbers]}
            file.write_table(pa.table(rows, schema=SCHEMA))
    return given


def dummy(latency: float) -> type[Any]:
    """A worker without a model, that takes so many seconds for a lease."""
    from dataclasses import replace

    from pipeline.execution.lease_worker import LeaseWorker, WorkerInfo
    from pipeline.execution.task import TaskResult
    from pipeline.report import WorkStats

    class Dummy(LeaseWorker):
        def _start(self, *_: Any) -> WorkerInfo:
            return WorkerInfo("here", os.getpid(), "", "store", "nothing")

        def stored_labels(self) -> bytes:
            return b""

        def _queue(self, number: int, group: Any) -> None:
            self._queued[number] = self._model.submit(self._answer, group)

        def _answer(self, group: Any) -> Any:
            time.sleep(latency)
            answer = "On the third of May."
            return [
                TaskResult({query.id: replace(task.row(query), answer=answer) for query in task.open_queries})
                for task in group
            ], WorkStats()

    return Dummy


def measure(latency: float, documents: int, workers: int) -> tuple[float, float, float, int]:
    """Documents a second from the first that was done, CPU and wall seconds of the driver, and its peak in bytes."""
    import ray

    import pipeline.distributed.ray_pool
    from pipeline.distributed.ray_pool import RayPool
    from pipeline.execution.commit import Committer
    from pipeline.execution.pool_executor import PoolExecutor
    from pipeline.execution.runner import Runner
    from pipeline.job.job_file import load_job

    moments: list[float] = []
    real = Committer.commit

    def commit(self: Committer, group: Any) -> None:
        moments.append(time.monotonic())
        real(self, group)

    Committer.commit, pipeline.distributed.ray_pool.LeaseWorker = commit, dummy(latency)  # type: ignore[method-assign, misc]
    with tempfile.TemporaryDirectory() as folder:
        job = load_job(place(Path(folder), documents, workers).folder / "job.yaml")
        ray.init("local", num_cpus=workers, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
        cpu, wall = time.process_time(), time.monotonic()
        Runner(job, RunObserver(), executor=lambda *arguments: PoolExecutor(*arguments, RayPool(job))).run()
        spent = time.process_time() - cpu, time.monotonic() - wall
        ray.shutdown()
    first = workers - 1  # to the last of a round: workers that wait as long are done at once
    rate = (len(moments) - 1 - first) / (moments[-1] - moments[first])
    return rate, *spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ray_data(documents: int) -> None:
    """Milliseconds a document through Ray Data, and through actors."""
    import ray

    text = ("The board met on the third of May and decided the budget. " * CHARACTERS)[:CHARACTERS]

    class Echo:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"id": batch["id"]}

    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    rows = [{"id": f"d{number}", "text": f"{number} {text}"} for number in range(documents)]
    started = time.monotonic()
    data = ray.data.from_items(rows, override_num_blocks=documents)  # or an actor takes a block of many at once
    pool = data.map_batches(Echo, batch_size=1, concurrency=2, num_cpus=1)
    count = sum(1 for _ in pool.iter_rows())
    _show("Ray Data, actor pool of 2", started, count)
    actors = [ray.remote(Echo).options(num_cpus=1).remote() for _ in range(2)]
    started, waiting, done = time.monotonic(), {}, 0
    todo = iter(rows)
    for actor in [*actors, *actors]:
        waiting[actor.__call__.remote(next(todo))] = actor
    while waiting:
        (reference,), _ = ray.wait(list(waiting))
        actor = waiting.pop(reference)
        ray.get(reference)
        done += 1
        if (row := next(todo, None)) is not None:
            waiting[actor.__call__.remote(row)] = actor
    _show("Ray Core, 2 actors", started, done)


def _show(way: str, started: float, count: int) -> None:
    milliseconds = (time.monotonic() - started) / count * 1e3
    print(json.dumps({"way": way, "documents": count, "ms_per_document_with_start": round(milliseconds, 2)}))


def _apart(*arguments: object) -> str:
    command = [sys.executable, "-m", "benches.ray_overhead", *map(str, arguments)]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT).stdout


def efficiency(latency: float, workers: Sequence[int], documents: int) -> None:
    """Print a line of JSON for each number of workers."""
    alone = 0.0
    for number in workers:
        rate = float(
            _apart("one", "--latency", latency, "--documents", documents * number, "--workers", number).split()[0]
        )
        alone = alone or rate / number
        figures = {"documents_per_s": round(rate, 2), "efficiency_percent": round(100 * rate / number / alone, 1)}
        print(json.dumps({"workers": number, "model_s": latency, **figures}), flush=True)


def driver(documents: Sequence[int]) -> None:
    """Print a line of JSON for each number of documents."""
    for number in documents:
        _, cpu, wall, peak = map(float, _apart("one", "--latency", 0, "--documents", number, "--workers", 1).split())
        each = {"ms_per_document": round(wall / number * 1e3, 2), "cpu_ms_per_document": round(cpu / number * 1e3, 2)}
        print(json.dumps({"documents": number, **each, "peak_MB": round(peak / 1e6)}), flush=True)


def main() -> None:
    """Print figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["efficiency", "driver", "data", "one"])
    parser.add_argument("--latency", type=float, default=0.25)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--documents", type=int, nargs="+")
    given = parser.parse_args()
    load_tuned_blas()
    if given.what == "one":
        print(*measure(given.latency, given.documents[0], given.workers[0]))
    elif given.what == "efficiency":
        efficiency(given.latency, given.workers, (given.documents or [40])[0])
    elif given.what == "driver":
        driver(given.documents or [1000, 10_000, 100_000])
    else:
        ray_data((given.documents or [2000])[0])


if __name__ == "__main__":
    main()
