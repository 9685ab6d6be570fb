"""Writes docs/reference.md from the code: commands, keys of job files, results and run.json, errors, exit codes.

python -m docs.reference
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from pipeline import errors
from pipeline.cli import app
from pipeline.job.job import QueryTable
from pipeline.job.job_schema import job_schema
from pipeline.output.rows import SCHEMA

PAGE = Path(__file__).with_name("reference.md")
COLUMNS = {
    "document_id": "the document's id",
    "query_id": "the query's id",
    "answer": "the answer; null in most error rows; of `AnswerCutOff` the text so far",
    "answer_json": "the answer if it is valid JSON of the query's schema",
    "thinking": "what the model thought first, with `generation.thinking: keep`",
    "status": "`ok`, `error`, or `skipped` where the query's `when` does not hold",
    "error_type": "one of the [types below](#error-types)",
    "error": "the message of the error",
    "finish_reason": "`stop`, or `length` where `max_tokens` ended the answer",
    "context_tokens": "tokens of the prefix: system text and document",
    "query_tokens": "tokens of the prompt behind the prefix",
    "answer_tokens": "tokens that were generated, with those of thinking",
    "fingerprint": "digest of all that decided the row ([what it covers](jobs.md#what-makes-rows-and-prefixes-stale))",
    "logprob_mean": "mean log-probability of the answer's tokens, before masks and temperature",
    "logprob_min": "the lowest of them",
    "choice_probabilities": "the probability of each of the query's `choices`",
    "samples": "all answers of a query with `samples`",
    "agreement": "share of the samples that give the answer",
    "evidence": "quotations: `quote`, `start` and `end` in characters of the text, `occurrences`, `page`",
    "versions": "packages and kind of device that computed the row",
}
RUN_FILE = {
    "job": "the job's name",
    "part": "the part of the job that this run answers; null for all of it",
    "command": "what resumes the run, from any folder",
    "state": "`running`, `finished`, `interrupted` or `failed`",
    "error": "why it failed",
    "started": "when it was started",
    "updated": "when this file was written",
    "documents": "documents of the run",
    "documents_done": "documents whose rows are on disk",
    "rows": "rows of the run; the next four add up to them at the end",
    "rows_kept": "rows that were there before and still hold",
    "rows_answered": "rows that the model answered",
    "rows_failed": "rows that are errors",
    "rows_skipped": "rows whose `when` does not hold",
    "rows_kept_unanswered": "those of the last two that were there before",
    "rows_beside": "rows of the result that a run of a part left as they were",
    "failures": "failed rows by error type",
    "first_failures": "the first failed row of each error type, and why",
    "cut": "answers that `max_tokens` cut off: `rows`, and by query `queries` and the largest limit `max_tokens`",
    "documents_truncated": "documents of which the model reads a part (`too_long: truncate`)",
    "documents_split": "documents that it reads in windows (`too_long: split`)",
    "prefixes_built": "prefixes that were prefilled",
    "prefixes_restored": "prefixes that were in the store",
    "context_tokens": "tokens of all prefixes",
    "prefilled_tokens": "those of them that were prefilled",
    "answer_tokens": "tokens that were generated",
    "attention": "what attends to prefixes: `NumPy`, `kernel` (of a GPU) or `MLX`",
    "batching": "which rows share a batch: `together`, `equal lengths` or `one by one`",
    "kernels": "on a CUDA GPU: how many kernels were in the cache, and how many were compiled",
    "resident": "prefixes by how they were held in memory: `packed` or `dense`",
    "prefix_bytes": "size of all prefixes",
    "effective_bits": "mean bits a value, with everything counted",
    "seconds": "duration of the run, with that of runs of its process that died",
    "load_seconds": "to load the model; the longest of several processes",
    "prefill_seconds": "to prefill and compress, summed over processes",
    "restore_seconds": "to read stored prefixes, summed over processes",
    "answer_seconds": "to answer, summed over processes",
    "processes": "processes of this machine that shared the work",
    "restarts": "deaths of the model's process or of workers, after which the run went on",
    "workers": "each worker of a run on Ray: where it runs, its work and its speed",
    "rows_of_other_versions": "kept rows that other versions of packages answered",
    "segments_of_other_versions": "used segments that other versions made",
    "other_versions": "how the first of these versions differ from those now",
    "interrupted": "whether the user stopped the run",
    "stopped_at": "the failed row that stopped a run with `--fail-fast`",
    "pace": "while it runs: the work done so far, that in progress included, and the seconds left",
    "identity": "digests of weights, tokenizer, codec and prefill",
}
DEFAULTS = {"name": "the file's name", "cache": "as below", "cache.dir": '`".cache"`'}  # not in the model of the job
EXIT_CODES = {
    0: "all rows are answered, or the command did what it was asked to do",
    1: "the run stopped: the disk is full, a server cannot be reached, a file changed, and all that is not below",
    2: "the job, its inputs or the command line is wrong; nothing was run and nothing was changed",
    3: "finished, but some rows failed, a score is below its minimum, or no setting keeps the bounds of `tune`",
    130: "interrupted; the same command goes on",
}


def page() -> str:
    """Return the text of docs/reference.md."""
    return "\n".join(
        [
            "# Reference",
            "",
            "Written by `python -m docs.reference` from the code. A test fails when it is out of date.",
            "",
            *("- [" + title + "](#" + title.lower().replace(" ", "-") + ")" for title, _ in _SECTIONS),
            *(line for title, section in _SECTIONS for line in ("", f"## {title}", "", *section())),
            "",
        ]
    )


def _commands() -> Iterator[str]:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        children = {f"{name} {child}": each for child, each in getattr(command, "commands", {}).items()}
        for path, each in (children or {name: command}).items():
            arguments = [one for one in each.params if one.param_type_name == "argument"]
            options = [one for one in each.params if one.param_type_name == "option" and one.name != "help"]
            synopsis = [one.metavar or one.name.upper() for one in arguments]
            synopsis = [text if one.required else f"[{text}]" for text, one in zip(synopsis, arguments, strict=True)]
            yield from (f"### pipeline {path}", "", f"`{' '.join(['pipeline', path, *synopsis])}`", "")
            yield from (each.help.strip(), "", "| option | does |", "| --- | --- |")
            yield from (_row(", ".join(_names(one)), one.help + _default(one)) for one in options)
            yield ""


def _names(option: Any) -> list[str]:
    value = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    return [f"`{name}{value}`" for name in [*option.opts, *option.secondary_opts]]


def _default(option: Any) -> str:
    if option.is_flag or option.default in (None, ()):
        return ""
    return f" Default: `{getattr(option.default, 'value', option.default)}`."


def _keys() -> Iterator[str]:
    yield from ("| key | value | default | meaning |", "| --- | --- | --- | --- |")
    schema = job_schema()
    yield from _keys_of(schema, "", schema["$defs"])


def _keys_of(section: dict[str, Any], prefix: str, sections: dict[str, Any]) -> Iterator[str]:
    for name, key in section["properties"].items():
        if name in section.get("required", ()):
            default = "required"
        elif "default" in key:
            default = "as below" if "$ref" in key else f"`{json.dumps(key['default'])}`"
        else:
            default = DEFAULTS[f"{prefix}{name}"]
        yield _row(f"`{prefix}{name}`", _kind(key), default, key["description"])
        for reference in re.findall(r"\$defs/(\w+)", json.dumps({**key, "description": ""})):
            inner = f"{prefix}{name}" + (" (as a table)" if reference == QueryTable.__name__ else "")
            yield from _keys_of(sections[reference], f"{inner}.", sections)


def _kind(key: dict[str, Any]) -> str:
    """Return the values that a key of the schema may have, in words."""
    if "enum" in key:
        return ", ".join(f"`{json.dumps(value)}`" for value in key["enum"])
    kinds = key.get("anyOf") or key.get("oneOf") or key.get("type", "object")
    if isinstance(kinds, str):
        return {"string": "text", "object": "mapping", "array": "list", "boolean": "true or false"}.get(kinds, kinds)
    each = (_kind(kind if isinstance(kind, dict) else {"type": kind}) for kind in kinds)
    return " or ".join(dict.fromkeys(each))


def _columns() -> Iterator[str]:
    yield from ("| column | type | content |", "| --- | --- | --- |")
    yield from (_row(f"`{field.name}`", f"`{field.type}`", COLUMNS[field.name]) for field in SCHEMA)


def _run_file() -> Iterator[str]:
    yield "A run writes `<output>.run.json` every few seconds. It also has the keys that tell"
    yield "[what made the result](jobs.md#the-result)."
    yield from ("", "| key | content |", "| --- | --- |")
    yield from (_row(f"`{key}`", content) for key, content in RUN_FILE.items())


def _error_types() -> Iterator[str]:
    yield from ("| type of an error row | meaning |", "| --- | --- |")
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.RowError)]
    yield from (
        _row(f"`{one.__name__}`", " ".join((one.__doc__ or "").partition("``")[0].split()))
        for one in kinds
        if one is not errors.RowError
    )


def _exit_codes() -> Iterator[str]:
    yield from ("| exit code | meaning |", "| --- | --- |")
    yield from (_row(f"`{code}`", meaning) for code, meaning in EXIT_CODES.items())


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


_SECTIONS = (
    ("Job files", _keys),
    ("Results", _columns),
    ("The run file", _run_file),
    ("Error types", _error_types),
    ("Exit codes", _exit_codes),
    ("Commands", _commands),
)

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
