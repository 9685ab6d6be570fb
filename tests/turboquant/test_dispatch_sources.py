"""The list of model files whose K/V go nowhere but into attention, held against the installed sources."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from turboquant.dispatch import COMPRESSIBLE, NAME


def uses_outside_attention(source: str) -> list[str] | None:
    """Names bound to fetched K/V that are used otherwise than as arguments of attention; None where nothing fetches."""
    offending: list[str] = []
    fetches = False
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        assignments = [node for node in ast.walk(function) if isinstance(node, ast.Assign) and is_fetch(node.value)]
        fetches |= any(is_fetch(node) for node in ast.walk(function))
        if not assignments:
            continue
        fetched = {name.id for node in assignments for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}
        harmless = attention_arguments(function) | other_branches(function)
        offending += [
            name.id
            for name in ast.walk(function)
            if isinstance(name, ast.Name)
            and isinstance(name.ctx, ast.Load)
            and name.id in fetched
            and name.lineno > assignments[0].lineno
            and id(name) not in harmless
        ]
    return offending if fetches else None


def is_fetch(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update_and_fetch"


def attention_arguments(function: ast.FunctionDef) -> set[int]:
    return {
        id(argument)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == NAME
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]
    }


def other_branches(function: ast.FunctionDef) -> set[int]:
    """What runs only where nothing is fetched: the else of an if whose body fetches."""
    return {
        id(node)
        for branch in ast.walk(function)
        if isinstance(branch, ast.If) and any(is_fetch(node) for part in branch.body for node in ast.walk(part))
        for part in branch.orelse
        for node in ast.walk(part)
    }


def source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize("module", sorted(COMPRESSIBLE))
def test_the_model_uses_fetched_keys_and_values_in_attention_alone(module: str) -> None:
    assert uses_outside_attention(source_of(module)) == []


@pytest.mark.parametrize("module", ["deepseek_v3", "gemma2", "phixtral"])
def test_the_check_finds_other_uses(module: str) -> None:
    assert uses_outside_attention(source_of(f"mlx_lm.models.{module}")) != []
