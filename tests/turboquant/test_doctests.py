"""The examples in turboquant's docstrings, run as they stand; and the names the package promises."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import turboquant

MODULES = [module.name for module in pkgutil.walk_packages(turboquant.__path__, "turboquant.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    attempted = {name: doctest.testmod(importlib.import_module(name)).attempted for name in MODULES}
    assert {"turboquant.codebook", "turboquant.codec", "turboquant.streaming"} <= {
        n for n, tried in attempted.items() if tried
    }


@pytest.mark.parametrize("name", turboquant.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(turboquant, name).__name__ == name


def test_other_names_do_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = turboquant.nonsense
