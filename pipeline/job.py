"""The YAML job: what a job file may say, its defaults, and the errors that say what is wrong with one.

It knows keys, types, bounds and paths. It does not know what is in the files that the paths name, whether a
template fits its columns, or anything about a model but its name.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from pipeline.budget import checked_budget
from pipeline.errors import JobError, one_line, suggestion

ThinkingMode = Literal[False, "drop", "keep"]
DEFAULT_SYSTEM = "Answer from the document only. If the document does not say, say so."


@dataclass(frozen=True)
class Settings:
    """How one query is answered, with the job's defaults filled in."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()
    json_schema: str | None = None
    thinking: ThinkingMode = False


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _schema_text(value: Any) -> str | None:
    """A JSON schema, given as such, as its text or as {file: path}, as its text; keys stay in their order."""
    origin = ""
    if isinstance(value, dict) and value.keys() == {"file"}:
        origin, value = f" in {value['file']}", _content(Path(str(value["file"])))
    try:
        schema = json.loads(value) if isinstance(value, str | bytes) else value
        text = json.dumps(schema, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"has what JSON has not ({one_line(error)}); put dates and the like in quotes") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON{origin} ({one_line(error)})") from None
    if not isinstance(schema, dict | NoneType):
        raise ValueError(f"is no JSON schema{origin}, which is a mapping of keys")
    return None if schema is None else text


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read from {file}: {error.strerror}") from None


# Strict, because in lax mode `max_tokens: true` would be 1 and `seed: "7"` would be 7.
class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_Text = Annotated[str, AfterValidator(_not_blank)]
_Path = Annotated[Path, Field(strict=False)]
_MaxTokens = Annotated[int, Field(ge=1)]
_Temperature = Annotated[float, Field(ge=0)]
_TopP = Annotated[float, Field(gt=0, le=1)]
_Seed = Annotated[int, Field(ge=0)]
_Stop = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
_Schema = Annotated[str | None, BeforeValidator(_schema_text)]
_Bits = Literal[2, 3, 4, 5, 6, 8]


class Documents(_Section):
    """Where the documents are: a Parquet file, a folder of them or a glob, and two of their columns."""

    path: _Text
    id: _Text = "id"
    text: _Text = "text"


class Prompt(_Section):
    """Jinja templates over a row's columns; `system: null` is no system text at all."""

    system: str | None = DEFAULT_SYSTEM
    context: _Text = "{{ text }}"


class Generation(_Section):
    """Defaults for every query, and how many rows are decoded together."""

    max_tokens: _MaxTokens = 256
    temperature: _Temperature = 0.0
    top_p: _TopP = 1.0
    seed: _Seed = 0
    stop: _Stop = ()  # texts that end an answer, and are not part of it
    thinking: ThinkingMode = False  # whether a model that can is to think first, and what becomes of that
    batch_size: Annotated[int, Field(ge=1)] = 8


class Query(_Section):
    """One question asked of every document, with what it sets otherwise than `generation`."""

    id: _Text
    text: _Text
    max_tokens: _MaxTokens | None = None
    temperature: _Temperature | None = None
    top_p: _TopP | None = None
    seed: _Seed | None = None
    stop: _Stop | None = None
    json_schema: _Schema = None  # what the answer is to be JSON of

    @model_validator(mode="after")
    def _check_stop(self) -> Query:
        if self.stop and self.json_schema:
            raise ValueError("has both stop and json_schema; an answer with a schema ends where its JSON does")
        return self

    def settings(self, defaults: Generation) -> Settings:
        """This query's own settings over the job's defaults; texts that end an answer end none that has a schema."""
        stop = defaults.stop if self.stop is None else self.stop
        return Settings(
            max_tokens=defaults.max_tokens if self.max_tokens is None else self.max_tokens,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            seed=defaults.seed if self.seed is None else self.seed,
            stop=() if self.json_schema else stop,
            json_schema=self.json_schema,
            thinking=defaults.thinking,
        )


class Cache(_Section):
    """Where prefixes are kept and how they are compressed."""

    dir: _Path
    key_bits: _Bits = 4
    value_bits: _Bits = 4
    layer_bits: dict[int, _Bits] = {}
    sinks: Annotated[int, Field(ge=0)] = 16
    window: Annotated[int, Field(ge=0)] = 128
    extra_bits: Annotated[float, Field(ge=0, le=16)] = 0.2
    prefill: Literal["exact", "streaming"] = "exact"
    segment: Annotated[int, Field(ge=512)] = 4096  # tokens, of a streaming prefill
    budget: Annotated[int | str, AfterValidator(checked_budget)] | None = None
    keep: Literal["always", "job"] = "always"
    resident: Literal["auto", "packed", "dense"] = "auto"


class Output(_Section):
    """The result file."""

    path: _Path


class Job(_Section):
    """A whole job. Every path is absolute; `model` is a folder's path or a Hugging Face repo id."""

    name: _Text
    model: _Text
    revision: _Text | None = None  # of a Hugging Face repo: a branch, a tag or a commit
    adapter: _Path | None = None  # a folder that mlx-lm's training wrote
    trust_remote_code: bool = False  # run code that comes with the model
    documents: Documents
    prompt: Prompt = Prompt()
    queries: Annotated[tuple[Query, ...], Field(min_length=1, strict=False)]
    generation: Generation = Generation()
    cache: Cache
    output: Output

    @property
    def schemas(self) -> frozenset[str]:
        """The schemas of all queries."""
        return frozenset(query.json_schema for query in self.queries if query.json_schema)

    @model_validator(mode="after")
    def _check_across_sections(self) -> Job:
        for query_id, times in Counter(query.id for query in self.queries).items():
            if times > 1:
                raise ValueError(f"queries: the id '{query_id}' is given {times} times; ids must be unique")
        if _feeds_itself(self.output.path, self.documents.path):
            raise ValueError(
                f"output.path: {self.output.path} would be read as documents by the next run; "
                "write it to another folder"
            )
        return self


def load_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read and check a job file; raises JobError.

    Paths in the file are relative to its folder. `overrides` are "key.path=value", the value being YAML;
    paths in them are relative to the current directory.
    """
    tree = _parse_yaml(_read(path), str(path))
    if not isinstance(tree, dict):
        raise JobError(f"{path}: expected a mapping of keys, such as 'model: ...', got {_describe(tree)}")
    tree = _resolve(tree, "", path.parent, str(path))
    tree.setdefault("name", path.stem)
    for override in overrides:
        _apply(override, tree)
    try:
        return Job.model_validate(tree)
    except ValidationError as error:
        raise JobError(_explain(error.errors(), str(path), overrides)) from None


_SCHEMA_FILE = re.compile(r"queries\.\d+\.json_schema\.file")


def _feeds_itself(output: Path, documents: str) -> bool:
    fixed, recursive, _ = documents.partition("**")
    if recursive:
        return output.is_relative_to(fixed)
    return output.parent == Path(documents) or output.match(documents)


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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        beside = [file.name for file in path.parent.glob("*.yaml")]
        raise JobError(f"{path}: no such job file{suggestion(path.name, beside)}") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from None


def _parse_yaml(source: bytes | str, origin: str) -> Any:
    try:
        return yaml.load(source, _Loader)
    except yaml.MarkedYAMLError as error:
        raise JobError(f"{origin}: {_where(error)}{error.problem}{_quoting_hint(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise JobError(f"{origin}: not YAML: {one_line(error)}") from None


def _where(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _quoting_hint(error: yaml.MarkedYAMLError) -> str:
    """`{{ text }}` is a mapping in YAML and `*.parquet` an alias."""
    problems = ("unhashable", "expected alphabetic or numeric character")
    is_unquoted = (error.problem or "").removeprefix("found ").startswith(problems)
    return "; put a value that starts with {{ or * in quotes" if is_unquoted else ""


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
    if key not in ("adapter", "documents.path", "cache.dir", "output.path") and not _SCHEMA_FILE.fullmatch(key):
        return value
    if "://" not in value:
        return _absolute(value, base)
    if key == "documents.path":
        return value
    raise JobError(f"{origin}: {key}: expected a path on this machine, got the URL '{value}'")


def _absolute(value: str, base: Path) -> str:
    return os.path.abspath(base / os.path.expanduser(value))


def _resolve_model(value: str, base: Path, origin: str) -> str:
    folder = _absolute(value, base)
    if os.path.isdir(folder):
        return folder
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value):
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
    value = _resolve(_parse_yaml(text, origin), key, Path.cwd(), origin)
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
        raise JobError(f"{origin}: '{parent}' is {_describe(node)} and has no keys")
    if not part.isdecimal() or int(part) >= len(node):
        raise JobError(f"{origin}: '{parent}' is a list of {len(node)}: use {parent}.0 to {parent}.{len(node) - 1}")
    return int(part)


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "model_type": "a mapping of keys",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "a finite number",
    "too_short": "at least one",
    "string_too_short": "at least {min_length} character",
}


def _explain(errors: list[ErrorDetails], path: str, overrides: Sequence[str]) -> str:
    """One line about the error that is most likely the cause of the others."""
    # A misspelt required key is both unknown and missing; the unknown one says what to change.
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    location = error["loc"]
    key = ".".join(map(str, location))
    origin = _origin(key, path, overrides)
    if error["type"] == "extra_forbidden":
        return f"{origin}: unknown key '{key}'{_nearest_key(location)}"
    if error["type"] == "missing":
        return f"{origin}: the required key '{key}' is missing"
    if error["type"] == "value_error":
        return f"{origin}: {key + ' ' if key else ''}{error['ctx']['error']}"
    expected = _EXPECTED.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
    return f"{origin}: {key}: expected {expected}, got {_describe(error['input'])}{_text_hint(error)}"


def _origin(key: str, path: str, overrides: Sequence[str]) -> str:
    for override in reversed(overrides):
        name = override.partition("=")[0].strip()
        if key == name or key.startswith(f"{name}."):
            return f"--set {override}"
    return path


def _nearest_key(location: tuple[int | str, ...]) -> str:
    """The end of the message about an unknown key: the key most like it in the same section."""
    section: Any = Job
    for part in location[:-1]:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
        if section == tuple[Query, ...]:
            section = Query
    return suggestion(str(location[-1]), set(section.model_fields))


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list, tuple)):
        return "a mapping of keys" if isinstance(value, dict) else ("a list" if value else "an empty list")
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


def _text_hint(error: ErrorDetails) -> str:
    """YAML turns `id: no` and `id: 2024-01-01` into other things than text."""
    is_scalar = not isinstance(error["input"], (dict, list, type(None)))
    return "; put it in quotes" if error["type"] == "string_type" and is_scalar else ""
