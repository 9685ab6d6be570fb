"""The house rules of CONTRIBUTING: imports go one way, modules and functions are short, and each says what it knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(file for package in ("pipeline", "turboquant") for file in (ROOT / package).rglob("*.py"))
LINES, LINES_OF_A_FUNCTION = 300, 40
ROOMS = re.findall(r"^\| `pipeline/(\w+)/`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


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


def room_of(module: str) -> int | None:
    """A room's place in the table; None for what stands above or below all: the command line, and what all share."""
    _, room, *_ = (*module.split("."), "", "")
    return ROOMS.index(room) if room in ROOMS else None


def test_rooms_are_those_of_the_table() -> None:
    assert {f"pipeline.{room}" for room in ROOMS} == {name for name in PACKAGES if re.fullmatch(r"pipeline\.\w+", name)}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    names = set(imported(module))
    if module.startswith("turboquant"):
        assert not [name for name in names if name.startswith("pipeline")]
    elif module != "pipeline.cli":
        here, rooms = room_of(module), {name: room_of(name) for name in names if name.startswith("pipeline")}
        assert "pipeline.cli" not in names
        assert not [name for name, room in rooms.items() if room is not None and (here is None or room > here)]


def test_no_two_modules_import_each_other() -> None:
    TopologicalSorter({module: set(imported(module)) for module in MODULES}).prepare()  # raises CycleError


def test_what_only_measures_is_imported_by_nothing_that_computes() -> None:
    measuring = {name for name in MODULES if name.startswith("turboquant.measuring")}
    users = {module for module in MODULES if module not in measuring and measuring & set(imported(module))}
    assert users == {"turboquant.bench", "turboquant.fidelity", "pipeline.commands.contenders"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_is_short_and_says_what_it_knows(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree) is not None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            said = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
            docstring = 0 if said is None else (said.end_lineno or 0) - said.lineno + 1
            assert (node.end_lineno or 0) - node.lineno + 1 - docstring <= LINES_OF_A_FUNCTION, node.name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_that_are_spoken_of_exist(module: str) -> None:
    said = re.findall(r"([\w/]+\.py)\b", FILES_OF[module].read_text(encoding="utf-8"))
    assert not [name for name in said if not any(f"/{file}".endswith(f"/{name}") for file in map(str, FILES))]
