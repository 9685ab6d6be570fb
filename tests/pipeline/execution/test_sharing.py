"""A store that several jobs use: who builds what, what may go first, and that no budget is exceeded at any moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline.execution.engine
from pipeline.cache.entries import size_of
from pipeline.cache.pins import Pins
from pipeline.cache.store import Store
from tests import ROOT, warm
from tests.pipeline.steps import watching
from tests.pipeline.workplace import Interrupting, Workplace

STREAMING = ("cache.prefill=streaming", "cache.segment=512")


def long_text(name: str, times: int = 70) -> str:
    """About 20 tokens a time, and other text for every name."""
    return "".join(f"{name}{number} The board met on the third of May and decided. " for number in range(times))


def fresh(workplace: Workplace, *overrides: str) -> bytes:
    """The result of a run on an empty store; nothing from before is left, nor anything of it."""
    forget(workplace)
    workplace.run(*overrides)
    content = workplace.output.read_bytes()
    forget(workplace)
    return content


def forget(workplace: Workplace) -> None:
    shutil.rmtree(workplace.cache, ignore_errors=True)
    workplace.output.unlink(missing_ok=True)


# ---- a budget


@pytest.mark.skipif(sys.platform != "linux", reason="steps are watched through /proc")
@pytest.mark.parametrize("overrides", [(), STREAMING], ids=["exact", "streaming"])
def test_a_budget_is_never_exceeded(workplace: Workplace, overrides: tuple[str, ...]) -> None:
    if overrides:
        workplace.documents = {name: long_text(name) for name in ("a", "b", "c", "d", "e")}
    else:
        workplace.documents = {f"d{n}": f"{n} {text}" for n, text in enumerate([*workplace.documents.values()] * 3)}
    workplace.run(*overrides)
    expected, used = workplace.output.read_bytes(), size_of(workplace.cache)
    budget = used // 4
    for keep in ("always", "job"):
        forget(workplace)
        sizes: list[int] = []
        with watching(workplace.cache, lambda event, path, sizes=sizes: sizes.append(size_of(workplace.cache))):
            report = workplace.run(*overrides, f"cache.budget={budget}", f"cache.keep={keep}")
        assert len(sizes) > 50
        assert max(sizes) <= budget
        assert max(sizes) > budget // 2 or keep == "job"  # it is made use of
        assert report.rows_failed == 0
        assert workplace.output.read_bytes() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="steps are watched through /proc")
def test_what_a_job_needs_is_told_within_the_budget(workplace: Workplace) -> None:
    workplace.run()
    budget, sizes = size_of(workplace.cache) + 9000, []
    workplace.documents = {f"d{n}": f"{n} is a number." for n in range(800)}  # whose labels take 16 kB
    with watching(workplace.cache, lambda event, path: sizes.append(size_of(workplace.cache))):
        assert workplace.run(f"cache.budget={budget}", observer=Interrupting(chunk=2)).interrupted
    assert budget - 40_000 < max(sizes) <= budget
    assert list(workplace.cache.glob("jobs/*.json"))


def test_what_an_interrupted_job_needs_is_kept_for_a_week(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workplace.run()
    needed = {path.name for path in workplace.segments()}
    workplace.output.unlink()
    with monkeypatch.context() as patch:  # all are stored, and none is done
        patch.setattr(
            pipeline.execution.engine, "generate_answers", lambda *_: signal.raise_signal(signal.SIGINT) or []
        )
        with pytest.raises(BaseException):  # noqa: B017, PT011
            workplace.run()
    other = Workplace(tmp_path / "other", workplace.model)
    other.documents = {"x": long_text("x", 12), "y": long_text("y", 12)}
    other.tree["cache"] = {"dir": str(workplace.cache), "budget": size_of(workplace.cache) + 20_000}
    other.run()
    assert needed <= {path.name for path in workplace.segments()}
    assert "cache.budget" in caplog.text
    (file,) = workplace.cache.glob("jobs/*.json")
    os.utime(file, (time.time() - 8 * 24 * 3600,) * 2)
    other.output.unlink()
    assert other.run().rows_failed == 0
    assert not needed <= {path.name for path in workplace.segments()}


def test_needs_survive_a_clock_that_jumps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = Pins(tmp_path, Path("/a")), Pins(tmp_path, Path("/b"))
    mine.pin(["one"])
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert other.is_pinned("one")
    assert not other.is_pinned("two")


@pytest.mark.parametrize("stamp", [0.0, 4e9], ids=["1970", "2096"])
def test_a_clock_that_jumped_evicts_nothing_in_use(workplace: Workplace, stamp: float) -> None:
    expected = fresh(workplace, *STREAMING)
    workplace.documents = {name: long_text(name) for name in ("a", "b")}
    whole = fresh(workplace, *STREAMING)
    workplace.run(*STREAMING)
    size = size_of(workplace.cache)
    workplace.output.unlink()
    for path in workplace.cache.rglob("*"):
        os.utime(path, (stamp, stamp))
    workplace.documents["b"] += "And more."
    assert workplace.run(*STREAMING, f"cache.budget={size}").rows_failed == 0
    assert whole != workplace.output.read_bytes() != expected
    warm = workplace.output.read_bytes()
    assert fresh(workplace, *STREAMING) == warm


def test_a_finished_job_s_segments_go_when_it_keeps_none(workplace: Workplace) -> None:
    workplace.run()
    assert len(workplace.segments()) == 3
    assert workplace.run("cache.keep=job").rows_kept == 9
    assert workplace.segments() == []


# ---- chains


def test_a_long_system_text_is_prefilled_once(workplace: Workplace, prefilled: list[int]) -> None:
    workplace.tree["prompt"] = {"system": "Answer from the document only. " * 40}
    workplace.run()
    cold = workplace.output.read_bytes()
    assert len(prefilled) == 4
    assert prefilled[0] > 2 * max(prefilled[1:])
    assert len(workplace.segments()) == 4
    workplace.output.unlink()
    workplace.run()
    assert len(prefilled) == 4
    assert workplace.output.read_bytes() == cold
    workplace.documents = {"new": "Something else.", "d0": workplace.documents["d0"]}
    workplace.run()
    assert len(prefilled) == 5
    warm = workplace.output.read_bytes()
    assert fresh(workplace) == warm


def test_a_document_that_grew_reuses_its_segments(workplace: Workplace, prefilled: list[int]) -> None:
    workplace.documents = {"a": long_text("a")}
    workplace.run(*STREAMING)
    before = list(prefilled)
    workplace.documents["a"] += long_text("b", 3)
    workplace.run(*STREAMING)
    assert len(prefilled) == len(before) + 1  # the last, which the text before did not fill
    warm = workplace.output.read_bytes()
    assert fresh(workplace, *STREAMING) == warm
    assert len(prefilled) > len(before) + 2


def test_an_interrupted_streaming_prefill_goes_on(workplace: Workplace, prefilled: list[int]) -> None:
    workplace.documents = {"a": long_text("a")}
    expected = fresh(workplace, *STREAMING)
    segments = list(prefilled)
    prefilled.clear()
    interrupting = Interrupting(chunk=2)  # chunks are as long as segments
    assert workplace.run(*STREAMING, observer=interrupting).interrupted
    assert len(workplace.segments()) == 1
    workplace.run(*STREAMING)
    assert interrupting.prefilled == segments[:2]
    assert prefilled == segments[1:]
    assert workplace.output.read_bytes() == expected


@pytest.mark.parametrize("overrides", [(), STREAMING], ids=["exact", "streaming"])
def test_a_context_that_repeats_is_prefilled_once(
    workplace: Workplace, prefilled: list[int], overrides: tuple[str, ...]
) -> None:
    workplace.documents = {name: long_text("a") for name in "abc"}
    workplace.run(*overrides)
    assert len(prefilled) == (3 if overrides else 1)
    warm = workplace.output.read_bytes()
    assert fresh(workplace, *overrides) == warm


# ---- two jobs at once


def test_what_another_run_built_meanwhile_is_not_built_again(
    workplace: Workplace, prefilled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, other = Store.build_lock, Workplace(workplace.folder / "other", workplace.model)
    other.tree["cache"] = {"dir": str(workplace.cache)}

    def build_lock(*args: Any) -> Any:  # it was absent when looked for, and is there before the lock is taken
        monkeypatch.setattr(Store, "build_lock", real)
        other.run()
        return real(*args)

    monkeypatch.setattr(Store, "build_lock", build_lock)
    workplace.run()
    assert (len(other.observer.prefilled), len(prefilled)) == (3, 0)
    assert workplace.output.read_bytes() == other.output.read_bytes()


# A run that notes each prefill it begins; amid its first it says so, and waits until it is told to go on.
RUN = """
import logging, sys, time
from pathlib import Path
job, folder, waits = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "waits"
from turboquant.runtime.blas import load_tuned_blas
load_tuned_blas()  # log-probabilities are rounded alike by one BLAS only
from pipeline.job.job_file import load_job
from pipeline.progress import RunObserver
from pipeline.execution.runner import Runner

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
class Waiting(RunObserver):
    def prefill_started(self, document_id, tokens):
        with open(folder / "begun", "a") as file:
            print(document_id, file=file)

    def prefill_advanced(self, tokens):
        global waits
        if waits:
            (folder / "amid").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
            waits = False

Runner(load_job(Path(job)), Waiting()).run()
"""


def start(place: Workplace, folder: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(place.save()), str(folder), how]
    return warm.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not is_so():
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("killed", [False, True])
def test_two_jobs_at_once_build_each_segment_once(workplace: Workplace, tmp_path: Path, killed: bool) -> None:
    expected = fresh(workplace)
    second = Workplace(tmp_path / "second", workplace.model)
    second.tree["cache"] = {"dir": str(workplace.cache)}
    builder = start(workplace, tmp_path, "waits")
    wait_for((tmp_path / "amid").exists, builder)
    waiter = start(second, tmp_path, "goes on")
    assert waiter.stdout is not None
    assert any("being built by another run" in line for line in waiter.stdout)
    if killed:
        builder.kill()
    else:
        (tmp_path / "go").touch()
    waiter.communicate()
    builder.communicate()
    assert waiter.returncode == 0
    assert second.output.read_bytes() == expected
    begun = (tmp_path / "begun").read_text().split()
    assert len(set(begun)) == 3
    assert len(begun) == (4 if killed else 3)
    if not killed:
        assert workplace.output.read_bytes() == expected
