"""A tiny byte-level tokenizer, a tiny random model and a job that uses them, so that no test downloads one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benches import tiny
from pipeline.progress import RunObserver
from tests import warm
from tests.pipeline.workplace import Workplace


@pytest.fixture(scope="session", autouse=True)
def warm_children() -> Iterator[None]:
    """What the tests' own process starts with multiprocessing has imported everything."""
    with warm.children_of_this_process():
        yield


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    return tiny.make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    return tiny.write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, which takes two thirds of the time of two. All nine answers of a workplace differ."""
    return tiny.write_model(tmp_path_factory.mktemp("tiny-llama"), seed=1, scale=6.0, num_hidden_layers=1)


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Commands set the level of the package's log."""
    before = logging.getLogger("pipeline").level
    yield
    logging.getLogger("pipeline").setLevel(before)


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path) -> Workplace:
    return Workplace(tmp_path, tiny_model)


@pytest.fixture
def prefilled(workplace: Workplace) -> list[int]:
    """The lengths of the segments whose prefill was started by the workplace's runs."""
    return workplace.observer.prefilled


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """``pipeline run`` runs in this process, which takes a tenth of the time."""
    from pipeline.execution.runner import Runner

    def run(job: Any, quiet: bool, options: Any, metrics: Any, shard: Any) -> Any:
        return Runner(job, RunObserver(), options=options, shard=shard).run()

    monkeypatch.setattr("pipeline.execution.supervisor.supervise", run)
