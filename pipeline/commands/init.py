"""``pipeline init``: write a first job file for the user's documents, in which every key is explained.

The keys come from the model of the job, and their explanations from its schema.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from pipeline.commands.console import quoted
from pipeline.errors import InputError, JobError
from pipeline.files.atomic import atomic_file
from pipeline.files.tables import Table, first_rows
from pipeline.files.text_files import WholeText
from pipeline.inputs.documents import check_documents
from pipeline.inputs.prompts import template_columns
from pipeline.job.job import Job, Query, id_of
from pipeline.job.job_file import CACHE, load_job
from pipeline.job.job_schema import KEYS, job_schema
from turboquant.runtime.machine import usable_memory

# Models by the least memory of a GPU, or of a machine whose GPU shares it, in GB. They leave room for a long context.
# A CPU holds weights in float32 and is slow.
MODELS_ON_GPU = {
    48: "mlx-community/Qwen3-32B-4bit",
    24: "mlx-community/Qwen3-14B-4bit",
    15: "mlx-community/Qwen3-8B-4bit",
    7: "mlx-community/Llama-3.2-3B-Instruct-4bit",
    0: "mlx-community/Llama-3.2-1B-Instruct-4bit",
}
MODELS_ON_CPU = {15: "mlx-community/Llama-3.2-1B-Instruct-4bit", 0: "mlx-community/Qwen3-0.6B-4bit"}
QUESTION = "Summarize the document."
SCHEMA_FILE = "pipeline.schema.json"
_ID_NAMES = ("id", "document_id", "doc_id", "uuid", "key", "name", "file", "filename", "file_name", "path", "url")
_TEXT_NAMES = ("text", "content", "contents", "body", "document", "transcript", "markdown")
_ROWS = 20  # rows that are read to guess columns
_LONGEST_ID = 200  # characters of an id, unless the column has a name of _ID_NAMES
_COMMENT_COLUMN = 44


@dataclass(frozen=True)
class FirstJob:
    """The values of a first job file. documents: path or URL. id, text: names of columns. queries: texts."""

    documents: str
    id: str
    text: str
    model: str
    queries: Sequence[str]


def are_tables(documents: str) -> bool:
    """Return whether a path names tables, which have columns to choose, and not files that are a document each."""
    return not isinstance(Table(documents, "DOCUMENTS").files[0].format, WholeText)


def guess_columns(documents: str) -> tuple[str, str]:
    """Return the columns of ids and of texts, guessed from names and first rows. Raises InputError."""
    rows = first_rows(documents, "DOCUMENTS", _ROWS)
    names = list(rows[0]) if rows else []
    kinds = {name: {type(row[name]) for row in rows if row[name] is not None} for name in names}
    texts = [name for name in names if kinds[name] == {str}]
    ids = [name for name in names if _may_be_id([row[name] for row in rows])]
    named_ids = [name for wanted in _ID_NAMES for name in ids if name.lower() == wanted]
    named_texts = [name for wanted in _TEXT_NAMES for name in texts if name.lower() == wanted]
    short_ids = [name for name in ids if max(len(str(row[name])) for row in rows) <= _LONGEST_ID]
    document_id = next(iter(named_ids or short_ids), None)
    rest = [name for name in texts if name != document_id]
    longest = max(rest, key=lambda name: sum(len(row[name] or "") for row in rows), default=None)
    text = next((name for name in named_texts if name != document_id), longest)
    if document_id is None or text is None:
        missing = "ids, each its own: say --id" if document_id is None else "texts: say --text"
        raise InputError(f"{documents}: no column looks like {missing}; there are: {', '.join(names) or 'no rows'}")
    return document_id, text


def suitable_model() -> str:
    """Return the largest of a few models that suits this machine's memory and device."""
    if sys.platform == "darwin":
        return model_for(usable_memory(), on_gpu=True)
    try:
        query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]  # in MiB, a line for each
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
        return model_for(int(answer.split()[0]) << 20, on_gpu=True)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return model_for(usable_memory(), on_gpu=False)


def model_for(memory: int, on_gpu: bool) -> str:
    """Return the largest of a few models for a number of bytes of memory.

    >>> model_for(16 << 30, on_gpu=True), model_for(8 << 30, on_gpu=False)
    ('mlx-community/Qwen3-8B-4bit', 'mlx-community/Qwen3-0.6B-4bit')
    """
    models = MODELS_ON_GPU if on_gpu else MODELS_ON_CPU
    return next(model for least, model in models.items() if memory >= least * 1e9)


def write_job(path: Path, first_job: FirstJob, force: bool = False) -> None:
    """Check and write a job file, and write the schema beside it. Raises JobError and OutputError."""
    if path.exists() and not force:
        raise JobError(f"{path}: exists already; --force replaces it")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in _lines(path, first_job)), encoding="utf-8")
        try:
            job = load_job(temporary)
            check_documents(job.documents, template_columns(job.prompt, job.documents))
        except JobError as error:
            raise type(error)(str(error).replace(str(temporary), str(path))) from None
    with atomic_file(path.with_name(SCHEMA_FILE)) as temporary:
        temporary.write_text(json.dumps(job_schema(), indent=1) + "\n", encoding="utf-8")


def _may_be_id(values: Sequence[object]) -> bool:
    is_whole = all(isinstance(value, str | int) and not isinstance(value, bool) and value != "" for value in values)
    return is_whole and len(set(map(str, values))) == len(values)


def _lines(path: Path, first_job: FirstJob) -> Iterator[str]:
    yield f"# yaml-language-server: $schema={SCHEMA_FILE}"
    plan, run = (quoted(["pipeline", command, path.name]) for command in ("plan", "run"))
    yield f"# In this folder, {plan} says what a run would cost, and {run} does it."
    yield "# Lines that begin with # show defaults."
    given = _given(path, first_job)
    for name, field in Job.model_fields.items():
        kind = field.annotation
        if name == "queries":
            yield _commented("queries:", name)
            yield from _query_lines(given["queries"])
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _section_lines(name, kind, given.get(name, {}))
        elif name in given:
            yield _commented(f"{name}: {_yaml(given[name])}", name)
        else:
            yield _commented(f"# {name}: {_yaml(path.stem if name == 'name' else field.default)}", name)


def _section_lines(section: str, kind: type[BaseModel], given: dict[str, Any]) -> Iterator[str]:
    yield _commented(f"{section}:" if given else f"# {section}:", section)
    for name, field in kind.model_fields.items():
        if name in given:
            yield _commented(f"  {name}: {_yaml(given[name])}", f"{section}.{name}")
        else:
            default = field.get_default(call_default_factory=True)
            yield _commented(f"#   {name}: {_yaml(default)}", f"{section}.{name}")


def _query_lines(queries: Sequence[dict[str, str]]) -> Iterator[str]:
    """Yield the lines of the queries. All other keys that a query may have follow the last one, as defaults."""
    for query in queries:
        yield _commented(f"  - id: {_yaml(query['id'])}", "queries.id")
        yield _commented(f"    text: {_yaml(query['text'])}", "queries.text")
    for name, field in Query.model_fields.items():
        if name not in ("id", "text"):
            yield _commented(f"#     {name}: {_yaml(field.default)}", f"queries.{name}")


def _given(path: Path, first_job: FirstJob) -> dict[str, Any]:
    ids: list[str] = []
    for text in first_job.queries:
        name = id_of(text)
        ids.append(f"{name}-{len(ids) + 1}" if name in ids else name)
    return {
        "model": _relative(first_job.model, path.parent) if os.path.isdir(first_job.model) else first_job.model,
        "documents": {"path": _relative(first_job.documents, path.parent), "id": first_job.id, "text": first_job.text},
        "queries": [{"id": name, "text": text} for name, text in zip(ids, first_job.queries, strict=True)],
        "cache": {"dir": CACHE},
        "output": {"path": f"out/{path.stem}.parquet"},
    }


def _relative(path: str, folder: Path) -> str:
    return path if os.path.isabs(path) or "://" in path else os.path.relpath(path, folder)


def _commented(line: str, key: str) -> str:
    return f"{line:<{_COMMENT_COLUMN}} # {KEYS[key]}"


def _yaml(value: object) -> str:
    """Return a value as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").strip()
