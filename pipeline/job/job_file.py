"""Read a job file: YAML with absolute paths and overrides put in. Every mistake in it becomes a message of one line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.errors import JobError, one_line, suggestion
from pipeline.files.encoding import NotText, decode
from pipeline.files.paths import absolute
from pipeline.job.job import QUERIES, Job, Output
from pipeline.job.shards import Shard
from pipeline.job.validation_errors import describe, explain_job
from turboquant.mlx_lm.loading import is_repo_id

CACHE = ".cache"  # beside the job file: the folder of the store, unless the job names another
MAX_VALUES = 1_000_000  # of a job file; the values of an alias count wherever it stands
_UPLOADS = ("s3", "s3a", "gs", "gcs")  # there a file appears as a whole or not at all
_GLOBS = ("documents.path", "queries.path")
_PATHS = (*_GLOBS, "adapter", "cache.dir", "output.path")
_HALF = re.compile("[\ud800-\udfff]")  # a half of a character in UTF-16
_SCHEMA_FILE = re.compile(r"queries\.\d+\.json_schema\.file")


def load_job(path: Path, overrides: Sequence[str] = (), shard: Shard | None = None) -> Job:
    """Read and check a job file. Raises JobError.

    Paths in the file are relative to its folder. overrides: "key.path=value", where the value is YAML; paths in it are
    relative to the current directory. shard: replace the job's output by the output of this shard.
    """
    try:
        content = decode(path.read_bytes())
    except FileNotFoundError:
        beside = [file.name for file in path.parent.glob("*.yaml")]
        raise JobError(f"{path}: no such job file{suggestion(path.name, beside)}") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from None
    except NotText as error:
        raise JobError(f"{path}: {error}; save it as UTF-8") from None
    tree = _parse_yaml(content, str(path))
    if not isinstance(tree, dict):
        raise JobError(f"{path}: expected a mapping of keys, such as 'model: ...', got {describe(tree)}")
    return make_job(tree, path.parent, path.stem, overrides, shard, str(path))


def make_job(
    tree: dict[Any, Any],
    folder: Path,
    name: str,
    overrides: Sequence[str] = (),
    shard: Shard | None = None,
    origin: str = "job",
) -> Job:
    """Check a job that is given as the mapping that its file would hold, which is changed. Raises JobError.

    folder: paths are relative to it. name: of the job, unless it has one. origin: the beginning of messages. overrides,
    shard: as `load_job` has them.
    """
    try:
        replaced = {override.partition("=")[0].strip() for override in overrides}  # these paths need not exist
        tree = _resolve({key: value for key, value in tree.items() if key not in replaced}, "", folder, origin)
        tree.setdefault("name", name)
        for override in overrides:
            _apply(override, tree)
        if isinstance(cache := tree.setdefault("cache", {}), dict):
            cache.setdefault("dir", _absolute(CACHE, folder))
        job = Job.model_validate(tree)
        if shard is None:
            return job
        return Job.model_validate(dict(job) | {"output": Output(path=str(shard.output(job.result_file)))})
    except RecursionError:
        raise JobError(f"{origin}: a mapping contains itself") from None
    except ValidationError as error:
        raise JobError(explain_job(error.errors(), Job, QUERIES, origin, overrides)) from None


# ---- YAML


# PyYAML, and not ruamel.yaml: that reads YAML 1.2, in which `id: no` is a text and `seed: 010` is ten instead of eight,
# so that job files would change their meaning. Its pure loader takes twice as long, and does not limit aliases either.
class _Loader(yaml.SafeLoader):
    """A loader of YAML for which a key that is given twice is an error, and 1e-3 is a number, which YAML 1.1 denies.

    Two escapes of UTF-16, as JSON writes an emoji ("\\ud83d\\ude00"), are one character; one of them alone is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _error(f"the key {describe(key.value)} is given twice", key)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if "\0" in value:
            raise _error("\\0 is a NUL character, which no text has", node)
        if not _HALF.search(value):
            return value
        try:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError as error:
            half = int.from_bytes(error.object[error.start : error.start + 2], "little")
            raise _error(f"\\u{half:04x} is half a character", node) from None


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(source: str, origin: str) -> Any:
    """Parse YAML. Raises JobError, which begins with `origin`."""
    try:
        tree = yaml.load(source, _Loader)
        if _count_values(tree, {}) > MAX_VALUES:
            raise JobError(f"{origin}: its aliases multiply to more than {MAX_VALUES:,} values; write the values out")
        return tree
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, error.problem or ""
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        # In YAML `{{ text }}` is a mapping, and `*.parquet` is an alias.
        unquoted = ("unhashable", "expected alphabetic or numeric character")
        is_unquoted = problem.removeprefix("found ").startswith(unquoted)
        hint = "; put a value that starts with {{ or * in quotes" if is_unquoted else ""
        raise JobError(f"{origin}: {place}{error.problem}{hint}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise JobError(f"{origin}: not YAML: {one_line(error)}") from None


def _count_values(tree: Any, counts: dict[int, int]) -> int:
    """Count the values of a tree. A mapping that contains itself has a finite count here; load_job refuses it later."""
    if not isinstance(tree, dict | list):
        return 1
    if id(tree) not in counts:
        counts[id(tree)] = 1
        children = tree.values() if isinstance(tree, dict) else tree
        counts[id(tree)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(tree)]


# ---- paths


def _resolve(value: Any, key: str, base: Path, origin: str) -> Any:
    """Return `value` with its paths made absolute, relative to `base`. key: the place of the value in the job."""
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
        return absolute(value, base) if key in _GLOBS else _absolute(value, base)
    if key in _GLOBS:
        return value
    if key == "output.path":
        return _checked_upload(value, origin)
    raise JobError(f"{origin}: {key}: expected a path on this machine, got the URL '{value}'")


def _checked_upload(url: str, origin: str) -> str:
    """Return the URL of a result if files can be uploaded to it. Raises JobError."""
    scheme, _, path = url.partition("://")
    if scheme not in _UPLOADS:
        raise JobError(
            f"{origin}: output.path: results can be written to this machine, s3:// and gs://, but not to {url}"
        )
    if path.endswith("/") or not PurePosixPath(path).parent.name:
        raise JobError(f"{origin}: output.path: {url} must name a file, as {scheme}://bucket/answers.parquet does")
    return url


def _resolve_model(value: str, base: Path, origin: str) -> str:
    """Return the absolute path of a model's folder, or a repo id. Raises JobError."""
    folder = _absolute(value, base)
    if os.path.isdir(folder):
        return folder
    if is_repo_id(value):
        return value
    raise JobError(
        f"{origin}: model: there is no folder {folder}, and '{value}' is not a Hugging Face repo id (owner/name)"
    )


def _absolute(value: str, base: Path) -> str:
    return os.path.abspath(base / os.path.expanduser(value))


# ---- overrides


def _apply(override: str, tree: dict[Any, Any]) -> None:
    """Put the value of an override, `key.path=value`, into the tree."""
    key, equals, text = override.partition("=")
    key, origin = key.strip(), f"--set {override}"
    if not equals or not all(key.split(".")):
        raise JobError(f"{origin}: expected key.path=value, such as generation.max_tokens=64")
    value = _resolve(_parse_yaml(text, origin), key, Path.cwd(), origin)
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents, start=1):
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[_index(node, part, ".".join(parents[:depth]), origin)]
    node[_index(node, last, key, origin)] = value


def _index(node: Any, part: str, key: str, origin: str) -> str | int:
    """Return the key or the index of the child `part` in a node of the tree."""
    if isinstance(node, dict):
        return part
    parent = key.rpartition(".")[0]
    if not isinstance(node, list):
        raise JobError(f"{origin}: '{parent}' is {describe(node)} and has no keys")
    if not part.isdecimal() or int(part) >= len(node):
        raise JobError(f"{origin}: '{parent}' is a list of {len(node)}: use {parent}.0 to {parent}.{len(node) - 1}")
    return int(part)
