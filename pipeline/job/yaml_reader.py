"""YAML as a job file may use it, read strictly. Knows no keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import JobError, one_line, suggestion

MOST_VALUES = 1_000_000  # of a job file, those of aliases counted wherever they stand


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, and 1e-3 is a number, which in YAML 1.1 it is not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(scalars):
            if any(key.value == earlier.value for earlier in scalars[:number]):
                problem = f"the key '{key.value}' is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read(path: Path) -> bytes:
    """The content of a job file. Raises JobError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        beside = [file.name for file in path.parent.glob("*.yaml")]
        raise JobError(f"{path}: no such job file{suggestion(path.name, beside)}") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from None


def parse(source: bytes | str, origin: str) -> Any:
    """What YAML says. Raises JobError, which names ``origin``, where it is none."""
    try:
        tree = yaml.load(source, _Loader)
        if _values(tree, {}) > MOST_VALUES:
            raise JobError(
                f"{origin}: its aliases multiply to more than {MOST_VALUES:,} values; write out what is meant"
            )
        return tree
    except yaml.MarkedYAMLError as error:
        raise JobError(f"{origin}: {_where(error)}{error.problem}{_quoting_hint(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise JobError(f"{origin}: not YAML: {one_line(error)}") from None


def _values(tree: Any, known: dict[int, int]) -> int:
    """How many values a tree holds; one that contains itself is finite here."""
    if not isinstance(tree, dict | list):
        return 1
    if id(tree) not in known:
        known[id(tree)] = 1
        known[id(tree)] = 1 + sum(
            _values(child, known) for child in (tree.values() if isinstance(tree, dict) else tree)
        )
    return known[id(tree)]


def _where(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _quoting_hint(error: yaml.MarkedYAMLError) -> str:
    """`{{ text }}` is a mapping in YAML and `*.parquet` an alias."""
    problems = ("unhashable", "expected alphabetic or numeric character")
    is_unquoted = (error.problem or "").removeprefix("found ").startswith(problems)
    return "; put a value that starts with {{ or * in quotes" if is_unquoted else ""
