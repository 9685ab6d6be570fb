"""A job file read: YAML, its paths made absolute and overrides put in, and what is wrong with it in one line.

Knows files and where in a job paths stand; what a job may say is job.py's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from pipeline.errors import JobError
from pipeline.job import yaml_reader as yaml_files
from pipeline.job.job import QUERIES, Job, Output
from pipeline.job.shards import Shard
from pipeline.job.validation_errors import describe, explain_job
from turboquant.mlx_lm.loading import is_repo_id

_UPLOADS = ("s3", "s3a", "gs", "gcs")  # where a file appears whole or not at all
_PATHS = ("adapter", "documents.path", "queries.path", "cache.dir", "output.path")
_SCHEMA_FILE = re.compile(r"queries\.\d+\.json_schema\.file")


def load_job(path: Path, overrides: Sequence[str] = (), shard: Shard | None = None) -> Job:
    """Read and check a job file; raises JobError.

    Paths in the file are relative to its folder. `overrides` are "key.path=value", the value being YAML;
    paths in them are relative to the current directory. The job of a shard has the shard's output.
    """
    tree = yaml_files.parse(yaml_files.read(path), str(path))
    if not isinstance(tree, dict):
        raise JobError(f"{path}: expected a mapping of keys, such as 'model: ...', got {describe(tree)}")
    try:
        tree = _resolve(tree, "", path.parent, str(path))
        tree.setdefault("name", path.stem)
        for override in overrides:
            _apply(override, tree)
        job = Job.model_validate(tree)
        if shard is None:
            return job
        return Job.model_validate(dict(job) | {"output": Output(path=str(shard.output(job.result_file)))})
    except RecursionError:
        raise JobError(f"{path}: a mapping contains itself") from None
    except ValidationError as error:
        raise JobError(explain_job(error.errors(), Job, QUERIES, str(path), overrides)) from None


def _resolve(value: Any, key: str, base: Path, origin: str) -> Any:
    """`value` with the paths in it made absolute; `key` is where in the job it stands."""
    if isinstance(value, dict):
        prefix = f"{key}." if key else ""
        return {name: _resolve(child, f"{prefix}{name}", base, origin) for name, child in value.items()}
    if isinstance(value, list) and key == "queries":
        return [_resolve(child, f"{key}.{number}", base, origin) for number, child in enumerate(value)]
    if not isinstance(value, str) or not value.strip():
        return value
    if key == "model":
        return _resolve_model(value, base, origin)
    if key not in _PATHS and not _SCHEMA_FILE.fullmatch(key):
        return value
    value = value.removeprefix("file://")
    if "://" not in value:
        return _absolute(value, base)
    if key in ("documents.path", "queries.path"):
        return value
    if key == "output.path":
        return _checked_output(value, origin)
    raise JobError(f"{origin}: {key}: expected a path on this machine, got the URL '{value}'")


def _checked_output(url: str, origin: str) -> str:
    scheme, _, path = url.partition("://")
    if scheme not in _UPLOADS:
        raise JobError(f"{origin}: output.path: results can be put on this machine, s3:// and gs://; not at {url}")
    if path.endswith("/") or not PurePosixPath(path).parent.name:
        raise JobError(f"{origin}: output.path: {url} must name a file, as {scheme}://bucket/answers.parquet does")
    return url


def _absolute(value: str, base: Path) -> str:
    return os.path.abspath(base / os.path.expanduser(value))


def _resolve_model(value: str, base: Path, origin: str) -> str:
    folder = _absolute(value, base)
    if os.path.isdir(folder):
        return folder
    if is_repo_id(value):
        return value
    raise JobError(
        f"{origin}: model: there is no folder {folder}, and '{value}' is not a Hugging Face repo id (owner/name)"
    )


def _apply(override: str, tree: dict[Any, Any]) -> None:
    """Put `key.path=value` into the tree."""
    key, equals, text = override.partition("=")
    key, origin = key.strip(), f"--set {override}"
    if not equals or not all(key.split(".")):
        raise JobError(f"{origin}: expected key.path=value, such as generation.max_tokens=64")
    value = _resolve(yaml_files.parse(text, origin), key, Path.cwd(), origin)
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents, start=1):
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[_index(node, part, ".".join(parents[:depth]), origin)]
    node[_index(node, last, key, origin)] = value


def _index(node: Any, part: str, key: str, origin: str) -> str | int:
    """What to index a node of the tree with to reach its child `part`."""
    if isinstance(node, dict):
        return part
    parent = key.rpartition(".")[0]
    if not isinstance(node, list):
        raise JobError(f"{origin}: '{parent}' is {describe(node)} and has no keys")
    if not part.isdecimal() or int(part) >= len(node):
        raise JobError(f"{origin}: '{parent}' is a list of {len(node)}: use {parent}.0 to {parent}.{len(node) - 1}")
    return int(part)
