"""Files of a model's folder are replaced while a run reads them: nothing is stored under a wrong fingerprint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline.execution.fingerprint
from benches.swaps import swap_at_random
from pipeline.errors import PipelineError
from pipeline.progress import RunObserver
from tests.pipeline.workplace import Workplace


class WhenStarted(RunObserver):
    """Does something when the identity of a run is taken and the model is not loaded yet."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action

    def run_started(self, rows: int) -> None:
        self._action()


@pytest.fixture
def model(workplace: Workplace) -> Path:
    """A copy of the workplace's model, which a test may change."""
    workplace.model = shutil.copytree(workplace.model, workplace.folder / "model")
    workplace.tree["model"] = str(workplace.model)
    return workplace.model


def exchange(model: Path, other: Path) -> None:
    """Let the two models exchange their weights."""
    names = [folder / "model.safetensors" for folder in (model, other)]
    aside = model.parent / "aside"
    for source, target in zip([names[0], names[1], aside], [aside, names[0], names[1]], strict=True):
        os.rename(source, target)


def test_weights_that_change_before_they_are_loaded_end_the_run(
    workplace: Workplace, model: Path, write_model: Callable[..., Path]
) -> None:
    other = write_model(workplace.folder / "other", seed=1)
    with pytest.raises(PipelineError, match="its weights changed since the run started; nothing was stored") as caught:
        workplace.run(observer=WhenStarted(lambda: exchange(model, other)))
    assert caught.value.exit_code == 1
    exchange(model, other)
    assert workplace.segments() == []
    report = workplace.run()
    assert (report.rows_answered, report.prefixes_built) == (9, 3)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_tokenizer_that_changes_before_it_is_loaded_ends_the_run(
    workplace: Workplace, model: Path, name: str
) -> None:
    def change() -> None:
        (model / name).write_bytes((model / name).read_bytes() + b" ")

    with pytest.raises(PipelineError, match="its tokenizer changed since the run started"):
        workplace.run(observer=WhenStarted(change))
    assert workplace.segments() == []


def test_weights_that_are_other_ones_only_while_they_are_loaded_are_loaded_again(
    workplace: Workplace, model: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.run()
    expected = workplace.output.read_bytes()
    workplace.output.unlink()
    shutil.rmtree(workplace.cache)
    other = write_model(workplace.folder / "other", seed=1)
    load, loads = pipeline.execution.fingerprint.load_model, []

    def load_swapped(*arguments: Any) -> Any:
        loads.append(1)
        if len(loads) > disturbed:
            return load(*arguments)
        exchange(model, other)
        try:
            return load(*arguments)
        finally:
            exchange(model, other)

    monkeypatch.setattr("pipeline.execution.fingerprint.load_model", load_swapped)
    disturbed = 9
    with pytest.raises(PipelineError, match="its files changed each of the 3 times that they were read"):
        workplace.run()
    assert workplace.segments() == []
    loads, disturbed = [], 2
    assert workplace.run().prefixes_built == 3
    assert workplace.output.read_bytes() == expected


def test_an_additional_chat_template_is_part_of_the_tokenizer(workplace: Workplace, model: Path) -> None:
    workplace.run()
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    assert workplace.run().rows_kept == 0


def test_swaps_at_random_moments_leave_nothing_wrong(tmp_path: Path) -> None:
    counts = swap_at_random(tmp_path, 12, 0)
    assert counts["wrong"] == 0
    assert counts["finished"] > 0
    assert counts["rows"] > 0
