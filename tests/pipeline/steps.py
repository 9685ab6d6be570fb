"""What a process does to a folder, step by step; and a run that is killed at every one of its steps.

    python tests/pipeline/steps.py MODEL FOLDER EVERY [KEY.PATH=VALUE ...]

runs a job undisturbed, then kills it with SIGKILL before its first step, its EVERY-th after that and so on, resumes
each of these runs, and prints a line of JSON for each. A step is something done to the folder after which its files
differ. Runs are forked from a process that has imported everything and built nothing, which MLX survives on a CPU.
Knows files, signals and reports; the product does not know that it is watched.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.utime",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
)
_watchers: list[tuple[str, Callable[[str, str], None]]] = []
_is_hooked = False


@contextmanager
def watching(folder: Path, tell: Callable[[str, str], None]) -> Iterator[None]:
    """``tell`` is called with what is about to be done to which file under the folder, as long as the block runs.

    Before whatever opens for writing, renames, removes or makes, and before every fsync, when all is written.
    """
    global _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hook)  # cannot be taken away again
        _is_hooked = True
    real = os.fsync

    def fsync(descriptor: int) -> None:
        _tell("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    _watchers.append((str(folder), tell))
    os.fsync = fsync
    try:
        yield
    finally:
        os.fsync = real
        _watchers.pop()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers or event not in EVENTS or (event == "open" and not arguments[2] & WRITES):
        return
    path = arguments[0]
    beside = arguments[{"os.rename": 2, "os.mkdir": 2}.get(event, -1)]
    if event in ("os.remove", "os.rmdir", "os.rename", "os.mkdir") and isinstance(beside, int) and beside >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{beside}"), os.fsdecode(path))
    _tell(event, path)


def _tell(event: str, path: Any) -> None:
    if isinstance(path, str | bytes | os.PathLike):
        for folder, tell in _watchers:
            if f"{os.fsdecode(path)}/".startswith(f"{folder}/"):
                tell(event, os.fsdecode(path))


def state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Every file's and folder's name, size and time of change. Not by pathlib, since it is done at each event."""
    found, folders = [], [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    found.append((entry.path, 0, 0))
                else:
                    state = entry.stat(follow_symlinks=False)
                    found.append((entry.path, state.st_size, state.st_mtime_ns))
    return sorted(found)


class Killer:
    """Kills this process at a step; at none where that is None, and counts. What was written last may be cut in half.

    Where a file is about to be made durable there are two steps: amid the writing of it, and behind.
    """

    def __init__(self, folder: Path, step: int | None) -> None:
        self.folder, self.step = folder, step
        self.steps: list[str] = []
        self._state: list[tuple[str, int, int]] = []
        self._told = False

    def tell(self, event: str, path: str) -> None:
        """A step, if the files have changed since the last."""
        if self._told or (state := state_of(self.folder)) == self._state:
            return
        self._told, self._state = True, state  # what is done here is no step
        name = f"{event} {Path(path).name}"
        if event == "fsync" and os.path.isfile(path):
            self._count(f"amid {name}", lambda: os.truncate(path, os.path.getsize(path) // 2))
        self._count(name, lambda: None)
        self._told = False

    def _count(self, name: str, prepare: Callable[[], None]) -> None:
        if len(self.steps) == self.step:
            prepare()
            os.kill(os.getpid(), signal.SIGKILL)
        self.steps.append(name)


def run_watched(place: Any, overrides: list[str], step: int | None) -> tuple[list[str], Any]:
    """Run a workplace's job, killed at a step; the steps and the report where it was not."""
    place.save()
    killer = Killer(place.folder, step)
    with _noting_prefills(place.folder.with_suffix(".prefilled")), watching(place.folder, killer.tell):
        report = place.run(*overrides)
    return killer.steps, report


@contextmanager
def _noting_prefills(log: Path) -> Iterator[None]:
    """Every prefill that is begun, by its tokens."""
    import pipeline.execution.prefixes as module

    real = module.prefill_segment

    def prefill(model: Any, tokens: Any, *rest: Any) -> Any:
        with log.open("a") as file:
            print(hash(tuple(tokens)), file=file)
        return real(model, tokens, *rest)

    module.prefill_segment = prefill  # type: ignore[assignment]
    try:
        yield
    finally:
        module.prefill_segment = real


def files_hold(place: Any) -> int:
    """Read everything that is called complete, as whoever trusts names would; returns the rows committed.

    Raises where a file is not what its name says.
    """
    import pyarrow.parquet as pq

    from pipeline.cache.codec import job_codec
    from pipeline.job.job_file import load_job
    from turboquant.io.segment_file import read_manifest, read_segment

    codec = job_codec(load_job(place.job_file).cache)
    for folder in place.segments():
        read_segment(folder, folder.name, codec, read_manifest(folder).start)
    for file in place.cache.glob("jobs/[!.]*"):
        json.loads(file.read_bytes())
    folder = Path(f"{place.output}.parts")
    parts = [pq.read_table(file) for file in folder.glob("*/[!.]*.parquet")]
    assert all(part.num_rows == len(place.queries) for part in parts)
    if place.output.exists():
        return int(pq.read_table(place.output).num_rows)
    group = [pq.read_table(file) for file in folder.glob(".group")]
    return len({row["document_id"] for part in [*parts, *group] for row in part.to_pylist()}) * len(place.queries)


def resume(place: Any, overrides: list[str]) -> dict[str, Any]:
    """Look at what a killed run left, run the job again, and tell what became of it."""
    stored, committed = {path.name for path in place.segments()}, files_hold(place)
    with _noting_prefills(place.folder.with_suffix(".prefilled")):
        report = place.run(*overrides)
    log = place.folder.with_suffix(".prefilled")
    begun = log.read_text().split() if log.exists() else []
    leftovers = [str(path.relative_to(place.folder)) for path in place.folder.rglob(".*")]
    return {
        "stored": len(stored),
        "committed": committed,
        "kept": report.rows_kept,
        "answered": report.rows_answered,
        "failed": report.rows_failed,
        "again": len(begun) - len(set(begun)),
        "leftovers": [*leftovers, *map(str, place.cache.glob("rejected/*")), *map(str, place.cache.glob("jobs/*"))],
        "bytes": place.output.read_bytes().hex(),
        "segments": sorted(path.name for path in place.segments()),
    }


def forked(task: Callable[[], Any], result: Path) -> int:
    """Do something in a process of its own, which writes what it gives as JSON; its wait status."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            result.write_text(json.dumps(task()))
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(process, 0)[1]


def import_everything() -> None:
    """What a run imports, and nothing that it builds."""
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    import mlx_lm.models.llama  # noqa: F401
    import transformers.models.llama  # noqa: F401


def make_place(folder: Path, model: Path, streaming: bool) -> Any:
    """A workplace of two documents and two queries; where the prefill is streaming, of three segments a document."""
    from tests.pipeline.workplace import Workplace

    place = Workplace(folder, model)
    del place.documents["d2"], place.queries[2]
    if streaming:
        place.documents = {
            name: "".join(f"{n}{text[:50]}" for n in range(60)) for name, text in place.documents.items()
        }
    return place


def main() -> None:
    """Kill, resume, print."""
    from pipeline.output import run_file as runfile

    runfile.SECONDS_BETWEEN_WRITES = 1e6  # or the number of steps would depend on the time they take
    model, folder, every, *overrides = sys.argv[1:]
    base, streaming = Path(folder), "cache.prefill=streaming" in overrides
    import_everything()

    def place(name: object) -> Any:
        return make_place(base / str(name), Path(model), streaming)

    def undisturbed() -> Any:
        whole = place("whole")
        steps, report = run_watched(whole, overrides, None)
        return {"steps": steps, "bytes": whole.output.read_bytes().hex(), "prefilled": report.prefilled_tokens} | {
            "segments": sorted(path.name for path in whole.segments()),
            "begun": len(whole.folder.with_suffix(".prefilled").read_text().split()),
        }

    assert forked(undisturbed, base / "whole.json") == 0
    whole = json.loads((base / "whole.json").read_text())
    print(json.dumps(whole))
    chosen = range(0, len(whole["steps"]), int(every))
    for step in chosen:
        status = forked(lambda step=step: run_watched(place(step), overrides, step)[0], base / "killed.json")
        # Two threads may write at once, which is one step then, so that a run may end a few steps earlier.
        assert os.WIFSIGNALED(status) or (status == 0 and step > len(whole["steps"]) - 10), f"{step} was not reached"
    outcome = base / "outcome.json"
    assert forked(lambda: [resume(place(step), overrides) for step in chosen], outcome) == 0
    for step, told in zip(chosen, json.loads(outcome.read_text()), strict=True):
        print(json.dumps({"step": whole["steps"][step], **told}))


if __name__ == "__main__":
    main()
