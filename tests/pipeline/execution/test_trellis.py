"""A job with trellis codes keeps the promises of one with scalar codes."""

from __future__ import annotations

import shutil
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


def trellis_job(folder: Path, model: Path) -> Workplace:
    """A workplace of two documents, since NumPy takes a second to encode one."""
    place = Workplace(folder, model)
    del place.documents["d2"]
    place.save(cache={"dir": "cache", "coding": "trellis"})
    return place


@pytest.fixture
def workplace(tmp_path: Path, model: Path) -> Workplace:
    return trellis_job(tmp_path / "place", model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Workplace:
    """The job after a run without a break; not to be changed."""
    place = trellis_job(tmp_path_factory.mktemp("whole"), model)
    assert place.run().prefixes_built == 2
    return place


def test_a_prefix_has_trellis_codes(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    workplace.run()
    assert "trellis is for GPUs" in caplog.text
    for folder in workplace.segments():
        (layer,) = read_segment(folder, folder.name, CacheCodec(coding="trellis")).layers
        assert layer.keys.tokens >= BLOCK
        assert layer.keys.tokens % BLOCK == 0


def test_restored_prefixes_and_single_rows_give_the_same_answers(workplace: Workplace, whole: Workplace) -> None:
    answers = whole.answers()
    assert len(set(answers.values())) > 3
    shutil.copytree(whole.cache, workplace.cache)
    assert workplace.run().prefixes_built == 0
    assert workplace.output.read_bytes() == whole.output.read_bytes()
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
def test_a_killed_run_is_resumed(
    workplace: Workplace, whole: Workplace, tmp_path: Path, target: str, when: str, count: int
) -> None:
    done = run_python(str(workplace.job_file), str(tmp_path / "log"), target, when, str(count))
    assert done.returncode == -signal.SIGKILL, done.stderr
    stored = len(workplace.segments())
    assert workplace.run().prefixes_built == 2 - stored
    assert workplace.output.read_bytes() == whole.output.read_bytes()
