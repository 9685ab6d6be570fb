"""The examples in turboquant's docstrings, run as they stand; and the names the package promises."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, generate_step

import turboquant

MODULES = [module.name for module in pkgutil.walk_packages(turboquant.__path__, "turboquant.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_examples_of_the_package(
    build_model: Callable[[str], Any],
    fill: Callable[..., list[Any]],
    random_tokens: Callable[[int, int], list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They stand in the package's docstring, with a model and its tokens taken for granted."""
    model, context = build_model("llama"), random_tokens(300, 0)
    monkeypatch.chdir(tmp_path)
    given = {
        **{name: getattr(turboquant, name) for name in turboquant.__all__},
        "mx": mx,
        "generate_step": generate_step,
        "BatchGenerator": BatchGenerator,
        "model": model,
        "context": context,
        "prompt": mx.array(context),
        "filled": fill(model, context),
    }
    results = doctest.testmod(turboquant, extraglobs=given)
    assert results.failed == 0
    assert results.attempted >= 9
    assert len((turboquant.__doc__ or "").splitlines()) < 60


def test_there_are_examples() -> None:
    attempted = {name: doctest.testmod(importlib.import_module(name)).attempted for name in MODULES}
    assert {"turboquant.quant.codebook", "turboquant.quant.codec", "turboquant.caches.streaming"} <= {
        n for n, tried in attempted.items() if tried
    }


@pytest.mark.parametrize("name", turboquant.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(turboquant, name).__name__ == name


def test_other_names_do_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = turboquant.nonsense
