"""`tune`: settings of compression measured on a job's own documents, and the choice written into the job file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.tuning import allocate
from pipeline.job.job_file import load_job
from tests import ROOT, warm
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace


@pytest.fixture
def job(workplace: Workplace) -> Path:
    return _with_longer_documents(workplace)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Any]:
    """What `tune` measures of the job."""
    return _tune(_with_longer_documents(Workplace(tmp_path_factory.mktemp("tuned"), tiny_model)))


def _with_longer_documents(workplace: Workplace) -> Path:
    """Documents of some 900 tokens, which are more than one segment of a streaming job."""
    workplace.documents = {name: text * 3 for name, text in workplace.documents.items()}
    return workplace.save()


def _tune(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    result = invoke("tune", *arguments, "--documents", "2", "--queries", "2", "--json")
    assert result.exit_code == code, result.output
    tuned: dict[str, Any] = json.loads(result.stdout)
    return tuned


def test_the_smallest_setting_that_keeps_the_bound_is_chosen(job: Path, tuned: dict[str, Any]) -> None:
    sizes = [each["bytes_per_token"] for each in tuned["settings"]]
    assert sizes == sorted(sizes)
    assert sizes[-1] < tuned["full_bytes_per_token"]
    assert (tuned["documents"], tuned["answers"], tuned["bounds"]["kl"]) == (2, 4, 0.001)
    kept = [each for each in tuned["settings"] if each["kl"] + 6.31 * each["kl_error"] <= 0.001]  # two documents
    assert tuned["chosen"] == kept[0]
    most = tuned["settings"][-1]["kl_most"]
    chosen = _tune(job, "--kl", str(2 * most), "--top1", "0", "--answers", "0")["chosen"]
    assert chosen["kl"] <= chosen["kl_most"] <= 2 * most


def test_no_setting_keeps_a_bound_of_nothing(job: Path) -> None:
    assert _tune(job, "--kl", "0", code=3)["chosen"] is None


def test_layers_get_bits_by_their_own_effect(
    job: Path, tuned: dict[str, Any], workplace: Workplace, write_model: Callable[..., Path]
) -> None:
    workplace.save(model=str(write_model(workplace.folder / "two-layers", num_hidden_layers=2)))
    names = [each["setting"]["layer_bits"] for each in _tune(job, "--layers", "--answers", "0")["settings"]]
    assert len(names) > len(tuned["settings"])
    assert any(names)
    assert not any("16" in each.values() for each in names)


def test_the_choice_is_written_into_the_job_file(job: Path, workplace: Workplace) -> None:
    job.write_text(f"# mine\n{job.read_text()}")
    chosen = _tune(job, "--answers", "0", "--write")["chosen"]["setting"]
    assert (chosen["key_bits"], chosen["value_bits"]) == (2, 2)
    cache = load_job(job).cache
    assert (cache.key_bits, cache.value_bits, cache.extra_bits) == (2, 2, chosen["extra_bits"])
    assert job.read_text().startswith("# mine\n")
    result = invoke("tune", job, "--answers", "0", "--documents", "1", "--write")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (0, "the job has these settings already")


def test_a_streaming_job_is_measured_as_it_prefills(job: Path, tuned: dict[str, Any]) -> None:
    streamed = _tune(job, "--set", "cache.prefill=streaming", "--set", "cache.segment=512")
    assert tuned["settings"][0]["kl"] != streamed["settings"][0]["kl"]


def test_documents_that_are_too_short_are_refused(workplace: Workplace) -> None:
    workplace.documents = {"d": "short"}
    assert "no document to tune with" in error_of(invoke("tune", workplace.save()))


def test_an_interrupted_measurement_ends_with_one_line_and_writes_nothing(job: Path, workplace: Workplace) -> None:
    written = job.read_text()
    # A shell starts commands in the background with SIGINT ignored, and the tests may run in the background.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start += "; from pipeline.cli import main; main()"
    command = [sys.executable, "-c", start, "tune", str(job), "--kl", "1", "--write"]
    process = warm.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("measured ")
    os.kill(process.pid, signal.SIGINT)
    out, error = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert error.splitlines()[-1] == "interrupted; nothing was kept"
    assert not [line for line in error.splitlines() if "Traceback" in line]
    assert job.read_text() == written
    assert not list(workplace.folder.rglob("*.safetensors"))


def test_bits_follow_effects_and_keep_the_mean() -> None:
    effects = [2.5e-4, 1e-6, 4e-3, 0.0]
    for mean in (2.0, 2.5, 3.0, 4.0, 7.5, 8.0):
        bits = allocate(effects, mean)
        assert sum(bits) <= mean * 4
        assert bits[2] >= bits[0] >= bits[1] >= bits[3]
    assert allocate(effects, 8.0) == [8, 8, 8, 8]
