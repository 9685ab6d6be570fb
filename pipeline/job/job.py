"""The job: what may be said of one, the defaults, and what must hold across its sections.

It knows keys, types, bounds and paths; how a job file is read is job_file.py's. It does not know what is in the files
that the paths name, whether a template fits its columns, or anything about a model but its name.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from pipeline.errors import one_line
from pipeline.job.budget import checked_budget
from pipeline.job.json_schema import schema_text

_MOST = (1 << 63) - 1
_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
_Value = TypeVar("_Value")
_FileName = TypeVar("_FileName", str, Path)
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


def _not_blank(text: _Value) -> _Value:
    if isinstance(text, str) and not text.strip():
        raise ValueError("is empty")
    return text


def _possible(path: _FileName) -> _FileName:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        raise ValueError(f"is no path: {one_line(error)}") from None
    return path


def _countable(amount: float) -> float:
    if amount > 1 and amount % 1:
        raise ValueError(f"is {amount:g}; above 1 Ray takes whole numbers only")
    return amount


def _custom(resources: dict[str, float]) -> dict[str, float]:
    if known := [name for name in resources if name in _RAYS_OWN]:
        raise ValueError(f"has {known[0]}, which is one of Ray's own; write scale.num_cpus or scale.num_gpus instead")
    return resources


# Strict, because in lax mode `max_tokens: true` would be 1 and `seed: "7"` would be 7.
class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_Text = Annotated[str, AfterValidator(_not_blank)]
_Path = Annotated[Path, Field(strict=False), BeforeValidator(_not_blank), AfterValidator(_possible)]
_MaxTokens = Annotated[int, Field(ge=1, le=_MOST)]
_Temperature = Annotated[float, Field(ge=0)]
_TopP = Annotated[float, Field(gt=0, le=1)]
_Seed = Annotated[int, Field(ge=0, le=_MOST)]
_Stop = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
_Schema = Annotated[str | None, BeforeValidator(schema_text), WithJsonSchema({"type": ["object", "string", "null"]})]
_Bits = Literal[2, 3, 4, 5, 6, 8]
_Amount = Annotated[float, Field(gt=0), AfterValidator(_countable)]


class Documents(_Section):
    """Where the documents are, a file, a folder or a glob, two of their columns, and which rows are meant."""

    path: _Text
    id: _Text = "id"
    text: _Text = "text"
    where: _Text | None = None
    limit: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    too_long: Literal["error", "truncate", "split"] = "error"  # for the model


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
    batch_size: Annotated[int, Field(ge=1, le=_MOST)] = 8


class Query(_Section):
    """One question asked of documents, with what it sets otherwise than `generation`."""

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


class QueryTable(_Section):
    """Where queries are, a file, a folder or a glob, and their columns.

    Each is asked of every document, or of the one whose id is in the column ``document_id``.
    """

    path: _Text
    id: _Text = "id"
    text: _Text = "text"
    document_id: _Text | None = None


# What stands for a kind of queries in the location of pydantic's errors.
QUERIES = {"<list>": Query, "<table>": QueryTable}


def _kind_of_queries(value: Any) -> str:
    return "<table>" if isinstance(value, dict | QueryTable) else "<list>"


class Cache(_Section):
    """Where prefixes are kept and how they are compressed."""

    dir: _Path
    key_bits: _Bits = 4
    value_bits: _Bits = 4
    layer_bits: dict[int, _Bits] = {}
    sinks: Annotated[int, Field(ge=0, le=_MOST)] = 16
    window: Annotated[int, Field(ge=0, le=_MOST)] = 128
    extra_bits: Annotated[float, Field(ge=0, le=16)] = 0.2
    prefill: Literal["exact", "streaming"] = "exact"
    segment: Annotated[int, Field(ge=512, le=_MOST)] = 4096  # tokens, of a streaming prefill
    budget: Annotated[int | str, AfterValidator(checked_budget)] | None = None
    keep: Literal["always", "job"] = "always"
    resident: Literal["auto", "packed", "dense"] = "auto"


class Output(_Section):
    """The result file, which may be a URL."""

    path: Annotated[str, BeforeValidator(_not_blank), AfterValidator(_possible)]


class Scale(_Section):
    """How a job is spread: over processes, and over workers of a Ray cluster, with what each of those asks for."""

    ranks: Annotated[int, Field(ge=1, le=_MOST)] = 1  # that hold the model between them
    workers: Annotated[int, Field(ge=1, le=_MOST)] | None = None  # as many as the cluster holds
    num_cpus: _Amount | None = None
    num_gpus: Annotated[float, Field(ge=0), AfterValidator(_countable)] | None = None
    resources: Annotated[dict[str, _Amount], AfterValidator(_custom)] = {}


class Job(_Section):
    """A whole job. Every path is absolute, or a URL; `model` is a folder's path or a Hugging Face repo id."""

    name: _Text
    model: _Text
    revision: _Text | None = None  # of a Hugging Face repo: a branch, a tag or a commit
    adapter: _Path | None = None  # a folder that mlx-lm's training wrote
    trust_remote_code: bool = False  # run code that comes with the model
    documents: Documents
    prompt: Prompt = Prompt()
    queries: Annotated[
        Annotated[tuple[Query, ...], Field(min_length=1, strict=False), Tag("<list>")]
        | Annotated[QueryTable, Tag("<table>")],
        Discriminator(_kind_of_queries),
    ]
    generation: Generation = Generation()
    retries: Annotated[int, Field(ge=0)] = 1  # of what failed in a way that may pass
    cache: Cache
    output: Output
    scale: Scale = Scale()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Job:
        if isinstance(self.queries, QueryTable):
            self._check_feedback("queries", self.queries.path)
        else:
            check_unique(self.queries)
        self._check_feedback("documents", self.documents.path)
        if self.scale.ranks > 1 and self.adapter is not None:
            raise ValueError("adapter: mlx-lm splits no model with an adapter over ranks; fuse them with `mlx_lm.fuse`")
        if self.scale.ranks > 1 and self.cache.keep == "job":
            raise ValueError("cache.keep: job is for a model in one process; set cache.budget to bound the store")
        return self

    @property
    def result_url(self) -> str | None:
        """Where the result goes if that is on another machine."""
        return self.output.path if "://" in self.output.path else None

    @property
    def result_file(self) -> Path:
        """Where the result is written on this machine: for good, or until it is uploaded."""
        if self.result_url is None:
            return Path(self.output.path)
        digest = hashlib.sha256(self.result_url.encode()).hexdigest()[:16]
        return self.cache.dir / "outputs" / digest / PurePosixPath(self.result_url).name

    def _check_feedback(self, what: str, path: str) -> None:
        for output in (Path(self.output.path), self.result_file):
            if _feeds_itself(output, path):
                told = f"output.path: {output} would be read as {what} by the next run"
                raise ValueError(f"{told}; write it to another folder")


def check_unique(queries: Sequence[Query]) -> None:
    """Raises ValueError where two queries have the same id."""
    for query_id, times in Counter(query.id for query in queries).items():
        if times > 1:
            raise ValueError(f"queries: the id '{query_id}' is given {times} times; ids must be unique")


def _feeds_itself(output: Path, documents: str) -> bool:
    fixed, recursive, rest = documents.partition("**")
    if recursive:  # the parts are below the output, and end as Parquet does
        names = output, output.with_suffix(".parquet")
        return output.is_relative_to(fixed) and any(path.match(f"*{rest.rpartition('/')[2]}") for path in names)
    return output.parent == Path(documents) or output.match(documents)
