"""The job: its keys with their types, bounds and defaults, and the rules across its sections.

job_file.py reads a job from a file. Whether the input files, the templates and the model fit the job is checked where
they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import NoneType
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

from pipeline.errors import JobError, one_line
from pipeline.files.encoding import checked_encoding
from pipeline.files.paths import literal
from pipeline.files.result_formats import check_suffix, is_parquet
from pipeline.job.budget import checked_budget
from turboquant.io.json_file import parse_json

_LARGEST_INT = (1 << 63) - 1
_MOST_QUOTATIONS = 10
_LONGEST_ID = 40  # characters of an id that is made from a query's text
_RAY_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")
_Value = TypeVar("_Value")
_PathOrText = TypeVar("_PathOrText", str, Path)
ThinkingMode = Literal[False, "drop", "keep"]
OutputLayout = Literal["long", "wide", "batch"]
EVIDENCE_KEY = "x-evidence"  # in a JSON schema: this field is a quotation
EVIDENCE_TURN_TOKENS = 256  # the most tokens of a turn in which the model quotes, with the question before it
SpecialTokensMode = Literal["text", "allow"]
DEFAULT_SYSTEM = "Answer from the document only. If the document does not say, say so."


@dataclass(frozen=True)
class Settings:
    """How one query is answered: its own settings over the job's defaults."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()
    json_schema: str | None = None
    thinking: ThinkingMode = False
    choices: tuple[str, ...] = ()
    evidence: int = 0
    samples: int = 1

    @property
    def wants_evidence(self) -> bool:
        """Whether the answer, or a field of its JSON, comes with quotations."""
        return self.evidence > 0 or (self.json_schema is not None and f'"{EVIDENCE_KEY}"' in self.json_schema)

    @property
    def longest(self) -> int:
        """The most tokens that an answer and its evidence take behind the query."""
        turns = max(self.evidence, 1) if self.wants_evidence else 0
        return self.max_tokens + turns * EVIDENCE_TURN_TOKENS

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that fingerprints cover. Later ones are covered only if they are used: rows stay valid."""
        later = {"choices": (), "evidence": 0, "samples": 1}
        return {name: value for name, value in vars(self).items() if name not in later or value != later[name]}


def _not_blank(text: _Value) -> _Value:
    if isinstance(text, str) and not text.strip():
        raise ValueError("is empty")
    return text


def _valid_path(path: _PathOrText) -> _PathOrText:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        raise ValueError(f"is not a valid path: {one_line(error)}") from None
    return path


def _result_name(path: str) -> str:
    check_suffix(path)
    return path


def _whole_above_one(amount: float) -> float:
    if amount > 1 and amount % 1:
        raise ValueError(f"is {amount:g}; above 1 Ray takes whole numbers only")
    return amount


def _custom_resources(resources: dict[str, float]) -> dict[str, float]:
    if predefined := [name for name in resources if name in _RAY_RESOURCES]:
        raise ValueError(
            f"has {predefined[0]}, which is one of Ray's own; write scale.num_cpus or scale.num_gpus instead"
        )
    return resources


def _number_of_bool(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


def id_of(text: str) -> str:
    """Return an id for a query that has none, made from its text alone, so that it is the same in every job.

    >>> id_of("Who are the parties?"), id_of("Who are the parties, and where does each of them live?")
    ('who-are-the-parties', 'who-are-the-parties-and-where-doe-ddf475')
    """
    name = re.sub(r"\W+", "-", text.lower()).strip("-")
    if name and len(name) <= _LONGEST_ID:
        return name
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:6]
    return f"{name[: _LONGEST_ID - 7].strip('-') or 'query'}-{digest}"


def _query_of_text(query: Any) -> Any:
    """Return a query that is written as its text alone with an id."""
    return {"id": id_of(query), "text": query} if isinstance(query, str) and query.strip() else query


def _schema_text(value: Any) -> str | None:
    """Return a JSON schema as text with its keys in order; a job gives it as a mapping, as text or as {file: path}."""
    origin = ""
    if isinstance(value, dict) and value.keys() == {"file"}:
        file = Path(str(value["file"]))
        try:
            origin, value = f" in {file}", file.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot be read from {file}: {error.strerror}") from None
    try:
        if isinstance(value, bytes):
            value = value.decode(json.detect_encoding(value))
        schema = parse_json((value if isinstance(value, str) else json.dumps(value, allow_nan=False)).encode())
        text = json.dumps(schema)
    except TypeError as error:
        raise ValueError(f"has a value that JSON lacks ({one_line(error)}); put dates and the like in quotes") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON{origin} ({one_line(error)})") from None
    if not isinstance(schema, dict | NoneType):
        raise ValueError(f"is no JSON schema{origin}, which is a mapping of keys")
    return None if schema is None else text


# Strict, because in lax mode `max_tokens: true` would be 1 and `seed: "7"` would be 7.
class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_Text = Annotated[str, AfterValidator(_not_blank)]
_Path = Annotated[Path, Field(strict=False), BeforeValidator(_not_blank), AfterValidator(_valid_path)]
_Encoding = Annotated[str, AfterValidator(checked_encoding)]
_MaxTokens = Annotated[int, Field(ge=1, le=_LARGEST_INT)]
_Temperature = Annotated[float, Field(ge=0)]
_TopP = Annotated[float, Field(gt=0, le=1)]
_Seed = Annotated[int, Field(ge=0, le=_LARGEST_INT)]
_Stop = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
_Schema = Annotated[str | None, BeforeValidator(_schema_text), WithJsonSchema({"type": ["object", "string", "null"]})]
_Choices = Annotated[tuple[_Text, ...], Field(strict=False, min_length=2)]
_Evidence = Annotated[
    int,
    Field(ge=0, le=_MOST_QUOTATIONS),
    BeforeValidator(_number_of_bool),
    WithJsonSchema({"type": ["boolean", "integer"], "minimum": 0, "maximum": _MOST_QUOTATIONS}),
]
_Samples = Annotated[int, Field(ge=1, le=1000)]
_Bits = Literal[2, 3, 4, 5, 6, 8, 16]
_Amount = Annotated[float, Field(gt=0), AfterValidator(_whole_above_one)]


class Documents(_Section):
    """The documents: a file, a folder, a glob or a URL, the columns of ids and texts, and which rows are used.

    follow_links: whether symbolic links in a folder, or that a glob matches, are followed. encoding: of texts, CSV,
    JSON and HTML without a byte-order mark; None for UTF-8.
    """

    path: _Text
    id: _Text = "id"
    text: _Text = "text"
    follow_links: bool = True
    encoding: _Encoding | None = None
    where: _Text | None = None
    limit: Annotated[int, Field(ge=1, le=_LARGEST_INT)] | None = None
    too_long: Literal["error", "truncate", "split"] = "error"

    @property
    def meanings(self) -> dict[str, str]:
        """The names that have a meaning of their own in templates, each with its column."""
        return {"text": self.text, "id": self.id}


class Prompt(_Section):
    """Jinja templates over the columns of a document's row. A job has no system text if `system` is null.

    special_tokens: whether special tokens of the model in the texts of a prompt are read as ordinary text.
    """

    system: str | None = DEFAULT_SYSTEM
    context: _Text = "{{ text }}"
    special_tokens: SpecialTokensMode = "text"


class Generation(_Section):
    """The default settings of queries, and how many rows are decoded together."""

    max_tokens: _MaxTokens = 256
    temperature: _Temperature = 0.0
    top_p: _TopP = 1.0
    seed: _Seed = 0
    stop: _Stop = ()  # an answer ends before the first of these texts
    thinking: ThinkingMode = False  # whether a model that can think does so before it answers, and if that is kept
    batch_size: Annotated[int, Field(ge=1, le=_LARGEST_INT)] = 16


class Query(_Section):
    """One question about documents, with the settings in which it differs from `generation`."""

    id: _Text
    text: _Text
    max_tokens: _MaxTokens | None = None
    temperature: _Temperature | None = None
    top_p: _TopP | None = None
    seed: _Seed | None = None
    stop: _Stop | None = None
    json_schema: _Schema = None  # the JSON schema that the answer follows
    choices: _Choices | None = None  # the answer is one of these texts
    evidence: _Evidence = 0  # how many quotations of the document come with the answer; true is one
    samples: _Samples = 1  # answers with seeds of their own, of which the commonest is taken
    template: bool | None = None  # whether the text is a template; None: if it uses `answers`
    when: _Text | None = None  # an expression over columns and `answers`; where it is false, the query is not asked
    previous: bool = False  # the model is shown the earlier queries of the document, with their answers
    check: _Text | None = None  # an expression over `answer` and `context`; an answer for which it is false is refused
    retries: Annotated[int, Field(ge=0, le=10)] = 0  # how often the query is asked again where `check` is false

    @model_validator(mode="after")
    def _check_kind(self) -> Query:
        if self.retries and not self.check:
            raise ValueError("has retries and no check, so no answer would be refused")
        if self.stop and self.json_schema:
            raise ValueError("has both stop and json_schema; an answer with a schema ends where its JSON does")
        if self.choices:
            for name in ("stop", "json_schema"):
                if getattr(self, name):
                    raise ValueError(
                        f"has both choices and {name}; an answer with choices is one of them as it is written"
                    )
            if self.samples > 1:
                raise ValueError("has both choices and samples; choices have probabilities, so nothing is sampled")
            if len(set(self.choices)) < len(self.choices):
                raise ValueError("has a choice twice")
        return self

    def check_settings(self, defaults: Generation) -> None:
        """Raise JobError if this query's settings do not fit the job's defaults."""
        if self.samples > 1 and self.settings(defaults).temperature == 0:
            raise JobError(
                f"queries: query '{self.id}' has {self.samples} samples, which are all the same at temperature 0; "
                "set temperature, to 0.7 for example"
            )
        if self.choices and defaults.thinking:
            raise JobError(
                f"queries: query '{self.id}' has choices, which are scored right behind the query; "
                "generation.thinking must be false"
            )

    def settings(self, defaults: Generation) -> Settings:
        """Return this query's settings over the job's defaults. An answer with a schema or choices has no stop."""
        stop = defaults.stop if self.stop is None else self.stop
        has_own_end = self.json_schema or self.choices
        return Settings(
            max_tokens=defaults.max_tokens if self.max_tokens is None else self.max_tokens,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            seed=defaults.seed if self.seed is None else self.seed,
            stop=() if has_own_end else stop,
            json_schema=self.json_schema,
            thinking=defaults.thinking,
            choices=self.choices or (),
            evidence=self.evidence,
            samples=self.samples,
        )


class QueryTable(_Section):
    """A table of queries: a file, a folder, a glob or a URL, and its columns.

    Each query is asked of every document, or only of the document whose id is in the column `document_id`. encoding: as
    that of documents.
    """

    path: _Text
    id: _Text = "id"
    text: _Text = "text"
    document_id: _Text | None = None
    encoding: _Encoding | None = None


# The names of the two kinds of queries in the locations of pydantic's errors.
QUERIES = {"<list>": Query, "<table>": QueryTable}


def _kind_of_queries(value: Any) -> str:
    return "<table>" if isinstance(value, dict | QueryTable) else "<list>"


class Cache(_Section):
    """Where prefixes are stored, and how they are compressed.

    16 bits, for keys and values together, keep both as the model computes them.
    """

    dir: _Path
    key_bits: _Bits = 4
    value_bits: _Bits = 4
    layer_bits: dict[int, _Bits] = {}
    sinks: Annotated[int, Field(ge=0, le=_LARGEST_INT)] = 16
    window: Annotated[int, Field(ge=0, le=_LARGEST_INT)] = 128
    extra_bits: Annotated[float, Field(ge=0, le=16)] = 0.2
    coding: Literal["scalar", "trellis"] = "scalar"
    prefill: Literal["exact", "streaming"] = "exact"
    segment: Annotated[int, Field(ge=512, le=_LARGEST_INT)] = 4096  # tokens of a segment in a streaming prefill
    budget: Annotated[int | str, AfterValidator(checked_budget)] | None = None
    keep: Literal["always", "job"] = "always"
    resident: Literal["auto", "packed", "dense"] = "auto"

    @model_validator(mode="after")
    def _check_bits(self) -> Cache:
        if (self.key_bits == 16) != (self.value_bits == 16):
            raise ValueError("key_bits and value_bits: 16 is for both together; it compresses neither")
        return self


class Output(_Section):
    """The result file; its path may be a URL, and its suffix says in which format it is written.

    columns: of the documents, which the result has too; "all" for all but their ids and texts. layout: `long` has a row
    for each document and query, `wide` a row for each document, `batch` the form of OpenAI's batch files.
    """

    path: Annotated[str, BeforeValidator(_not_blank), AfterValidator(_valid_path), AfterValidator(_result_name)]
    columns: Literal["all"] | Annotated[tuple[_Text, ...], Field(strict=False)] = ()
    layout: OutputLayout = "long"

    @property
    def is_plain(self) -> bool:
        """Whether the file at `path` is the one from which a later run keeps rows."""
        return is_parquet(self.path) and not self.columns and self.layout == "long"

    @property
    def rows_path(self) -> str:
        """The path or URL of the rows that later runs keep: `path`, or a file beside it if that has another form."""
        return self.path if self.is_plain else f"{self.path}.rows.parquet"


class Scale(_Section):
    """How a job is spread: over processes of one machine, ranks that hold one model, or workers of a Ray cluster."""

    processes: Annotated[int, Field(ge=1, le=_LARGEST_INT)] | None = None  # None: as cores, memory and documents allow
    ranks: Annotated[int, Field(ge=1, le=_LARGEST_INT)] = 1  # processes that hold the model between them
    workers: Annotated[int, Field(ge=1, le=_LARGEST_INT)] | None = None  # None: as many as the cluster has room for
    num_cpus: _Amount | None = None
    num_gpus: Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)] | None = None
    resources: Annotated[dict[str, _Amount], AfterValidator(_custom_resources)] = {}


class Job(_Section):
    """A whole job. Every path is absolute or a URL; `model` is the path of a folder or a Hugging Face repo id."""

    name: _Text
    model: _Text
    revision: _Text | None = None  # of a Hugging Face repo: a branch, a tag or a commit
    adapter: _Path | None = None  # a folder that mlx-lm's training wrote
    trust_remote_code: bool = False  # run code that comes with the model
    documents: Documents
    prompt: Prompt = Prompt()
    queries: Annotated[
        Annotated[
            tuple[Annotated[Query, BeforeValidator(_query_of_text)], ...],
            Field(min_length=1, strict=False),
            Tag("<list>"),
        ]
        | Annotated[QueryTable, Tag("<table>")],
        Discriminator(_kind_of_queries),
    ]
    generation: Generation = Generation()
    retries: Annotated[int, Field(ge=0)] = 1  # of rows that failed for a reason that may pass
    versions: Literal["keep", "redo"] = "keep"  # rows and prefixes that other versions of packages computed
    cache: Cache
    output: Output
    scale: Scale = Scale()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Job:
        if isinstance(self.queries, QueryTable):
            self._check_output_is_no_input("queries", self.queries.path)
        else:
            check_unique(self.queries)
        self._check_output_is_no_input("documents", self.documents.path)
        if self.scale.ranks > 1 and (self.scale.processes or 1) > 1:
            raise ValueError("scale.processes: the ranks of one model are processes already; leave it out")
        if self.scale.ranks > 1 and self.adapter is not None:
            raise ValueError("adapter: mlx-lm splits no model with an adapter over ranks; fuse them with `mlx_lm.fuse`")
        if self.scale.ranks > 1 and self.cache.keep == "job":
            raise ValueError("cache.keep: job is for a model in one process; set cache.budget to bound the store")
        return self

    @property
    def result_url(self) -> str | None:
        """The URL of the result's rows, or None if they are written on this machine."""
        return self.output.rows_path if "://" in self.output.path else None

    @property
    def result_file(self) -> Path:
        """The file of the result's rows on this machine; if the result has a URL, it is uploaded from there."""
        if self.result_url is None:
            return Path(self.output.rows_path)
        digest = hashlib.sha256(self.result_url.encode()).hexdigest()[:16]
        return self.cache.dir / "outputs" / digest / PurePosixPath(self.result_url).name

    def _check_output_is_no_input(self, section: str, path: str) -> None:
        for output in (Path(self.output.path), self.result_file):
            if _is_read_from(output, path):
                raise ValueError(
                    f"output.path: {output} would be read as {section} by the next run; write it to another folder"
                )


def check_unique(queries: Sequence[Query]) -> None:
    """Raise ValueError if two queries have the same id."""
    for query_id, times in Counter(query.id for query in queries).items():
        if times > 1:
            raise ValueError(f"queries: the id '{query_id}' is given {times} times; ids must be unique")


def _is_read_from(output: Path, inputs: str) -> bool:
    """Return whether inputs, a file, a folder or a glob, include the output or the parts of it."""
    fixed, recursive, rest = inputs.partition("**")
    fixed = literal(fixed)
    if recursive:  # the parts are in a folder beside the output, and their names end with .parquet
        names = output, output.with_suffix(".parquet")
        return output.is_relative_to(fixed) and any(path.match(f"*{rest.rpartition('/')[2]}") for path in names)
    return output.parent == Path(inputs) or output.match(inputs)
