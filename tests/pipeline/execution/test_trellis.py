"""A job with trellis codes keeps the promises of one with scalar codes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from benches import tiny
from tests.pipeline.execution.test_runner import run_python
from tests.pipeline.workplace import Workplace
from turboquant.io.segment_file import read_segment
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.trellis import BLOCK


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"), seed=1, scale=6.0, num_hidden_layers=1, head_dim=32)


@pytest.fixture
def workplace(tmp_path: Path, model: Path) -> Workplace:
    place = Workplace(tmp_path / "place", model)
    place.save(cache={"dir": "cache", "coding": "trellis"})
    return place


def test_a_prefix_has_trellis_codes(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    workplace.run()
    assert "trellis is for GPUs" in caplog.text
    for folder in workplace.segments():
        (layer,) = read_segment(folder, folder.name, CacheCodec(coding="trellis")).layers
        assert layer.keys.tokens >= BLOCK
        assert layer.keys.tokens % BLOCK == 0


def test_restored_prefixes_and_single_rows_give_the_same_answers(workplace: Workplace) -> None:
    report = workplace.run()
    assert report.prefixes_built == 3
    cold, answers = workplace.output.read_bytes(), workplace.answers()
    assert len(set(answers.values())) > 5
    workplace.output.unlink()
    assert workplace.run().prefixes_built == 0
    assert workplace.output.read_bytes() == cold
    workplace.output.unlink()
    workplace.run("generation.batch_size=1")
    assert workplace.answers() == answers


@pytest.mark.parametrize(
    ("target", "when", "count"),
    [
        ("mlx.core:save_safetensors", "half", 2),  # amid a segment's tensors
        ("pipeline.execution.engine:Engine._show_row", "after", 4),  # amid a document's answers
    ],
)
def test_a_killed_run_is_resumed(workplace: Workplace, tmp_path: Path, target: str, when: str, count: int) -> None:
    killed = Workplace(tmp_path / "killed", workplace.model)
    killed.save(cache=workplace.tree["cache"])
    done = run_python(str(killed.job_file), str(tmp_path / "log"), target, when, str(count))
    assert done.returncode == -signal.SIGKILL, done.stderr
    stored = len(killed.segments())
    assert killed.run().prefixes_built == 3 - stored
    workplace.run()
    assert killed.output.read_bytes() == workplace.output.read_bytes()
