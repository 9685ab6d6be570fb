"""The layers of CONTRIBUTING's tables: imports go one way, no two modules import each other, every module says why."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

FILES = sorted(file for package in ("pipeline", "turboquant") for file in (ROOT / package).rglob("*.py"))
LONGEST_MODULE = 500  # lines
TABLES = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LAYERS = {
    package: re.findall(rf"^\| `{package}/(\w+)/`", TABLES, flags=re.MULTILINE)
    for package in ("pipeline", "turboquant")
}


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES_OF = {module_of(file): file for file in FILES}
MODULES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in FILES_OF.items()}
PACKAGES = {module_of(file) for file in FILES if file.name == "__init__.py"}


def imported(module: str) -> Iterator[str]:
    """Modules of this project that a module imports, anywhere in it: at the top, in a function or for types alone."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in whole]
        else:
            continue
        yield from (name for name in names if name in MODULES and name != module)


def layer_of(module: str) -> int | None:
    """The place of a module's folder in its package's table; None for a module at the top of its package."""
    package, folder, *_ = (*module.split("."), "", "")
    return LAYERS[package].index(folder) if folder in LAYERS[package] else None


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_every_folder_is_in_the_table(package: str) -> None:
    folders = {name for name in PACKAGES if re.fullmatch(rf"{package}\.\w+", name)}
    assert {f"{package}.{folder}" for folder in LAYERS[package]} == folders


@pytest.mark.parametrize("module", sorted(module for module in MODULES if layer_of(module) is not None))
def test_a_folder_imports_only_those_above_it_in_the_table(module: str) -> None:
    package = module.partition(".")[0]
    here = layer_of(module)
    assert here is not None
    for name in imported(module):
        there = layer_of(name) if name.startswith(package) else None
        assert there is None or there <= here, f"{module} imports {name}, which is below it in CONTRIBUTING's table"


def test_one_module_of_each_package_imports_mlx_lm() -> None:
    """A new mlx-lm is met there; what its modules rely on is in their contract tests."""
    own = {"pipeline.models.mlx_lm_internals", "turboquant.mlx_lm.internals"}
    users = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "mlx_lm")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "mlx_lm" for alias in node.names))
    }
    assert users == own


def test_turboquant_does_not_know_the_pipeline() -> None:
    users = {module for module in MODULES if module.startswith("turboquant")}
    assert not [name for module in users for name in imported(module) if name.startswith("pipeline")]


def test_no_two_modules_import_each_other() -> None:
    TopologicalSorter({module: set(imported(module)) for module in MODULES}).prepare()  # raises CycleError


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_says_what_it_is_for_and_fits_on_a_few_screens(module: str) -> None:
    assert ast.get_docstring(MODULES[module]) is not None
    assert FILES_OF[module].read_text(encoding="utf-8").count("\n") <= LONGEST_MODULE


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_named_in_texts_exist(module: str) -> None:
    named = re.findall(r"([\w/]+\.py)\b", FILES_OF[module].read_text(encoding="utf-8"))
    files = [f"/{file}" for file in map(str, FILES)]
    assert not [name for name in named if not any(file.endswith(f"/{name}") for file in files)]
