"""Compare the lists of model files, and the table in the documentation, with the installed sources of mlx-lm."""

from __future__ import annotations

import ast

import pytest

from tests import ROOT
from tests.turboquant.model_table import called, document, row, tree
from turboquant.mlx_lm.families import COMPRESSIBLE, USES
from turboquant.mlx_lm.internals import ATTENTION, MODELS

DOCUMENT = ROOT / "docs" / "models.md"


def uses_outside_attention(source: ast.AST) -> list[str] | None:
    """Return the names of fetched K/V that are used outside of attention, or None if nothing is fetched."""
    offending = [name for name, _ in called(source) if name == "keys_and_values"]
    fetches = False
    for function in ast.walk(source):
        if not isinstance(function, ast.FunctionDef):
            continue
        assignments = [node for node in ast.walk(function) if isinstance(node, ast.Assign) and is_fetch(node.value)]
        fetches |= any(is_fetch(node) for node in ast.walk(function))
        if not assignments:
            continue
        fetched = {name.id for node in assignments for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}
        harmless = attention_arguments(function) | other_branches(function) | about_types(function)
        offending += [
            name.id
            for name in ast.walk(function)
            if isinstance(name, ast.Name)
            and isinstance(name.ctx, ast.Load)
            and name.id in fetched
            and name.lineno > (assignments[0].end_lineno or 0)
            and id(name) not in harmless
        ]
    return offending if fetches else None


def is_fetch(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update_and_fetch"


def attention_arguments(function: ast.FunctionDef) -> set[int]:
    return {
        id(argument)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == ATTENTION
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]
    }


def about_types(function: ast.FunctionDef) -> set[int]:
    """Find uses like ``keys.dtype`` and ``keys = keys.astype(...)``, after which they are still the keys."""
    harmless = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr == "dtype":
            harmless.add(id(node.value))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            target, method = node.targets[0], node.value.func
            if isinstance(method, ast.Attribute) and method.attr == "astype" and same_name(target, method.value):
                harmless.add(id(method.value))
    return harmless


def same_name(a: ast.AST, b: ast.AST) -> bool:
    return isinstance(a, ast.Name) and isinstance(b, ast.Name) and a.id == b.id


def other_branches(function: ast.FunctionDef) -> set[int]:
    """Find code that runs only where nothing is fetched: the else of an if whose body fetches."""
    return {
        id(node)
        for branch in ast.walk(function)
        if isinstance(branch, ast.If) and any(is_fetch(node) for part in branch.body for node in ast.walk(part))
        for part in branch.orelse
        for node in ast.walk(part)
    }


@pytest.mark.parametrize("module", sorted(COMPRESSIBLE))
def test_the_model_uses_fetched_keys_and_values_in_attention_alone(module: str) -> None:
    assert uses_outside_attention(tree(module.removeprefix(f"{MODELS}."))) == []


@pytest.mark.parametrize("file", sorted(USES))
def test_no_model_is_left_out_without_need(file: str) -> None:
    assert uses_outside_attention(tree(file)) != []


@pytest.mark.parametrize(
    ("use", "harmless"),
    [
        ("output = scaled_dot_product_attention(q, k, v, cache=cache).astype(v.dtype)", True),
        ("k = k.astype(mx.float32)", True),
        ("w = k.astype(mx.float32)", False),
        ("scores = q @ k.swapaxes(-1, -2)", False),
        ("return output, (k, v)", False),
        ("output = mx.fast.scaled_dot_product_attention(q, k, v)", False),
        ("k, v = other.keys_and_values()", False),
    ],
)
def test_the_check_tells_uses_apart(use: str, harmless: bool) -> None:
    source = ast.parse(f"def attend(q, k, v, cache):\n    k, v = cache.update_and_fetch(k, v)\n    {use}")
    assert (uses_outside_attention(source) == []) is harmless


def test_a_model_that_keeps_a_latent_vector_says_so() -> None:
    latent = {file for file, use in USES.items() if "latent" in use}
    assert latent
    assert all("kv_lora_rank" in ast.unparse(tree(file)) for file in latent)


@pytest.mark.parametrize(
    ("file", "status", "kept"),
    [
        ("qwen2", "compressed", ""),
        ("pixtral", "compressed", ""),  # its language model
        ("solar_open", "compressed", ""),  # another file's model under its own name
        ("qwen3_5", "partial", "recurrent state (ArraysCache)"),  # attention of another file, caches of its own
        ("gemma3", "partial", "sliding-window attention (RotatingKVCache)"),
        ("baichuan_m1", "none", "several caches in one layer (CacheList)"),
        ("glm_moe_dsa", "none", "deepseek_v32 keeps a latent vector (MLA) instead of keys and values (CacheList)"),
        ("mistral3", "as its language model", "llama, ministral3, mistral4"),
    ],
)
def test_the_table_reads_a_file_for_what_it_is(file: str, status: str, kept: str) -> None:
    _, found, _, reasons = row(file)
    assert (found, reasons) == (status, kept)


def test_the_documentation_s_table_is_that_of_the_installed_mlx_lm() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document()
