"""Where the time of a job goes, once it is under way: the model's evaluation, and all that is not.

    python -m benches.own_time [--job jobs/summarize.yaml] [--warm] [--set key=value ...]

Wall time of the thread that drives the model, each stretch of it counted for the innermost of the functions named in
``STAGES``; what other threads do meanwhile costs nothing but what it slows this one down. Loading the model and the
first group of documents, when things are compiled, are left out. With ``--warm`` the job is run before, so that
prefixes are restored.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.progress import RunObserver

ROOT = Path(__file__).resolve().parent.parent
GROUP = "pipeline.execution.engine:Engine.answer"
REST = "everything else"
OWN = "the pipeline itself"
MODEL = {"prefill: the model", "prefill: encoding", "answers: the model, in BatchGenerator", "decoding prefixes once"}
STAGES = {
    "turboquant.caches.prefix:feed": "prefill: the model",
    "turboquant.caches.prefix:encode_layer": "prefill: encoding",
    "mlx_lm.generate:BatchGenerator.next_generated": "answers: the model, in BatchGenerator",
    "pipeline.execution.engine:make_resident": "decoding prefixes once",
    "mlx_lm.generate:BatchGenerator.insert": "answers: joining the batch",
    "pipeline.models.output_parser:RowParser.answer": "answers: tokens to text",
    "pipeline.execution.prefixes:PrefixProvider.wait_until_stored": "waiting for segments to be written",
    "pipeline.cache.store:Store.load": "store: reading segments, not ahead",
    "pipeline.cache.store:Store.make_room": "store: making room",
    "pipeline.execution.engine:Engine.prepare": "tokenising, not ahead",
    "pipeline.execution.commit:Committer._wait": "waiting for rows to be written",
    GROUP: REST,
}


class Clock:
    """Wall time of one thread by stage."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.groups = 0
        self._thread = threading.current_thread()
        self._stack: list[str] = []
        self._since = 0.0

    def watch(self, target: str, stage: str) -> None:
        """Count the time in a function, given as ``module:name`` or ``module:Class.name``, for a stage."""
        module, path = target.split(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        real = vars(owner)[name]
        bare = real.__func__ if isinstance(real, classmethod) else real

        def timed(*args: Any, **kwargs: Any) -> Any:
            return self._timed(stage, bare, args, kwargs, target == GROUP)

        setattr(owner, name, classmethod(timed) if isinstance(real, classmethod) else timed)

    def _timed(self, stage: str, do: Callable[..., Any], args: Any, kwargs: Any, is_group: bool) -> Any:
        if threading.current_thread() is not self._thread:
            return do(*args, **kwargs)
        self._count()
        self._stack.append(stage)
        try:
            return do(*args, **kwargs)
        finally:
            self._count()
            self._stack.pop()
            if is_group:
                self.groups += 1
                if self.groups == 1:
                    self.seconds.clear()

    def _count(self) -> None:
        """The time since the last change belongs to the innermost stage; between two groups, to the rest."""
        now = time.perf_counter()
        if self._stack or self.groups:
            self.seconds[self._stack[-1] if self._stack else REST] += now - self._since
        self._since = now


def main() -> None:
    """Print a line of JSON for each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=ROOT / "jobs" / "summarize.yaml")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of pipeline run")
    arguments = parser.parse_args()
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    from pipeline.execution.runner import Runner
    from pipeline.job.job_file import load_job

    with tempfile.TemporaryDirectory() as folder:
        paths = [f"cache.dir={folder}/cache", f"output.path={folder}/out.parquet"]
        job = load_job(arguments.job, [*arguments.set, *paths])
        if arguments.warm:
            Runner(job, RunObserver()).run()
            job.result_file.unlink()
        clock = Clock()
        for target, stage in STAGES.items():
            clock.watch(target, stage)
        Runner(job, RunObserver()).run()
    total = clock.seconds.total()
    own = sum(seconds for stage, seconds in clock.seconds.items() if stage not in MODEL)
    stages = {f"{clock.groups - 1} groups of documents": total, **dict(clock.seconds.most_common()), OWN: own}
    for stage, seconds in stages.items():
        print(json.dumps({"stage": stage, "seconds": round(seconds, 3), "percent": round(100 * seconds / total, 2)}))


if __name__ == "__main__":
    main()
