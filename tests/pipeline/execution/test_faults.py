"""A run killed with SIGKILL at its steps: what is left is never half read, and the next run makes the same of it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.pipeline.steps import Steps, files_hold, watching
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="steps are watched through /proc")
STREAMING = ["cache.prefill=streaming", "cache.segment=512"]


def make_place(folder: Path, model: Path, is_streaming: bool) -> Workplace:
    """A workplace of two documents and two queries; where the prefill is streaming, of three segments a document."""
    place = Workplace(folder, model)
    del place.documents["d2"], place.queries[2]
    if is_streaming:
        place.documents = {
            name: "".join(f"{n}{text[:50]}" for n in range(60)) for name, text in place.documents.items()
        }
    return place


# All steps of the first; of the others a sample, since a run takes most of a second.
@pytest.mark.parametrize(
    ("every", "overrides", "steps", "segments"),
    [
        (1, [], 45, 2),
        (12, STREAMING, 80, 6),
        (9, ["cache.budget=70000"], 45, 1),
        (13, [*STREAMING, "cache.keep=job", "cache.budget=150000", "generation.batch_size=2"], 80, 0),
    ],
    ids=["exact", "streaming", "exact in a budget", "streaming in a budget"],
)
def test_a_run_killed_at_any_step_is_resumed(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    overrides: list[str],
    steps: int,
    segments: int,
) -> None:
    # Or the number of steps would depend on the time they take.
    monkeypatch.setattr("pipeline.output.run_file.SECONDS_BETWEEN_WRITES", 1e6)
    place = make_place(tmp_path / "place", tiny_model, STREAMING[0] in overrides)
    prefilled = place.observer.prefilled
    left = Steps(place.folder, tmp_path / "left", every, lambda: len(prefilled))
    with watching(place.folder, left.tell):
        place.run(*overrides)
    assert left.count >= steps
    expected, stored, begun = place.output.read_bytes(), place.segments(), len(prefilled)
    assert len(stored) == segments

    for step in left.copied:
        shutil.rmtree(place.folder)
        shutil.copytree(step.files, place.folder)
        prefilled.clear()
        committed = files_hold(place)
        report = place.run(*overrides)
        assert place.output.read_bytes() == expected, step
        assert place.segments() == stored, step
        assert report.rows_kept == committed, step  # no row that was there is answered again
        assert (report.rows_kept + report.rows_answered, report.rows_failed) == (4, 0), step
        assert step.noted + len(prefilled) <= begun + 1, step  # the segment in flight is begun again
        leftovers = [place.folder.rglob(".*"), place.cache.glob("rejected/*"), place.cache.glob("jobs/*")]
        assert [path for paths in leftovers for path in paths] == [], step
