"""Descriptions of a job file's keys, and the JSON Schema with which an editor completes and checks them."""

from __future__ import annotations

from typing import Any

from pipeline.job.job import Job, QueryTable

KEYS = {
    "name": "what the job is called; the file's name unless given",
    "model": "a folder, relative to this file, or a Hugging Face repo id",
    "revision": "of a repo: a branch, a tag or a commit",
    "adapter": "a folder that mlx_lm.lora wrote",
    "trust_remote_code": "true: run Python code that comes with the model",
    "documents": "each is a row of a table, or a file",
    "documents.path": "a file, a folder, a glob or a URL: Parquet, CSV, JSON, Arrow, text, PDF, DOCX, HTML or EPUB",
    "documents.id": "the column that holds each document's id; {{ id }} in templates",
    "documents.text": "the column that holds its text; {{ text }} in templates",
    "documents.follow_links": "false: leave out files that are symbolic links, or in folders that are",
    "documents.encoding": "of texts, CSV and JSON without a byte-order mark, such as cp1252; null: utf-8",
    "documents.where": "a condition on columns, such as year > 2020 or row['Pages'] < 9; null for all rows",
    "documents.limit": "the most documents that are used",
    "documents.too_long": "documents longer than the model reads: error, truncate, or split into windows",
    "prompt": "what the model reads before a query: jinja2 with {{ text }}, {{ id }}, {{ title }} or {{ row['A B'] }}",
    "prompt.system": "the system text; null for none",
    "prompt.context": "the document; it must use its text",
    "prompt.special_tokens": "marks such as <|im_end|> in texts: text reads them as text, allow obeys them",
    "queries": "asked of every document: texts, mappings (evidence, choices, json_schema, when and more) or a table",
    "queries.id": "names the query in the result",
    "queries.text": "the question",
    "queries.max_tokens": "most tokens of this answer; null: as in generation",
    "queries.temperature": "0 takes the likeliest token each time; null: as in generation",
    "queries.top_p": "samples come from the likeliest tokens of this total probability; null: as in generation",
    "queries.seed": "of random samples; null: as in generation",
    "queries.stop": "texts that end this answer and are left out of it; null: as in generation",
    "queries.json_schema": "the answer is JSON of this schema, given here or as {file: path}",
    "queries.choices": "the answer is one of these texts",
    "queries.evidence": "how many quotations of the document come with the answer; true: one",
    "queries.samples": "how many answers are given; the commonest one counts",
    "queries.template": "true: {{ title }} in the text is filled in; false: nothing is; null: where it uses answers",
    "queries.when": "asked only where this is true, such as answers.signed == 'yes' or year > 2020",
    "queries.previous": "true: the model is shown the document's earlier queries with their answers",
    "queries.check": "an answer for which this is false is an error, such as len(answer) < 200 or answer in context",
    "queries.retries": "how often a query is asked again, with another seed and the reason, where check is false",
    "queries table.path": "a table of queries: a file, a folder, a glob or a URL",
    "queries table.id": "the column that names each query",
    "queries table.text": "the column that holds the question; each line of a text file is one",
    "queries table.document_id": "the column that names the document of each query; null: all documents",
    "queries table.encoding": "of a table in CSV or JSON without a byte-order mark; null: utf-8",
    "generation": "settings of queries that don't set them themselves",
    "generation.max_tokens": "most tokens of an answer",
    "generation.temperature": "0 takes the likeliest token each time",
    "generation.top_p": "samples come from the likeliest tokens of this total probability",
    "generation.seed": "of random samples",
    "generation.stop": "texts that end an answer and are left out of it",
    "generation.thinking": "drop or keep: a model that can think does so first, and its thinking is dropped or kept",
    "generation.batch_size": "queries decoded together; documents with fewer share a batch",
    "retries": "how often a row is tried again if the model fails, for example without memory",
    "versions": "redo: answer and build again what other versions of packages or another kind of device computed",
    "cache": "the compressed prompt caches, one for each document",
    "cache.dir": "the store; any number of jobs may share it; .cache beside this file unless given",
    "cache.key_bits": "2, 3, 4, 5, 6 or 8; 16, for both, compresses nothing",
    "cache.value_bits": "2, 3, 4, 5, 6 or 8; 16, for both, compresses nothing",
    "cache.layer_bits": "bits of single layers, counted from the end if negative, as {0: 8, -1: 8}",
    "cache.sinks": "first tokens kept as 16-bit floats",
    "cache.window": "the most of the last tokens that are kept finer, for example with 8 bits instead of 4",
    "cache.extra_bits": "the most that finer tokens may cost, in bits per value",
    "cache.coding": "trellis: codes of 2 to 4 bits that lose a third to a half less; for GPUs, see docs/fidelity.md",
    "cache.prefill": "streaming: store and compress a context in segments while it is read",
    "cache.segment": "tokens of a segment",
    "cache.budget": "the most that dir may hold: bytes, a size (20GB) or a share of the disk (10%)",
    "cache.keep": "job: drop a document's prefix with its last answer",
    "cache.resident": "packed: decode a prefix at every step; dense: once; auto: as the device and memory suggest",
    "output": "the answers, by default one row for each document and query",
    "output.path": "*.parquet, *.csv or *.jsonl, also at s3:// or gs://; a report of the run is in .run.json beside it",
    "output.columns": "columns of the documents that the result has too, as [title, year]; all: every other one",
    "output.layout": "long: a row for each document and query; wide: for each document; batch: as OpenAI's",
    "scale": "how a job is spread over machines and processes; see docs/scaling.md",
    "scale.processes": "processes with a model each; null: one, on a CPU one a core, as documents and memory allow",
    "scale.ranks": "how many processes hold the model between them, as mlx.launch starts them",
    "scale.workers": "workers of a run with --on ray; null: as many as the cluster has room for",
    "scale.num_cpus": "CPUs of each worker; null: all that its machine has for it",
    "scale.num_gpus": "GPUs of each worker; null: 1 where there are GPUs, else 0",
    "scale.resources": "other resources of each worker, by Ray's names, as {mac: 1}",
}


def job_schema() -> dict[str, Any]:
    """Return the JSON Schema of a job file."""
    schema = Job.model_json_schema()
    _describe(schema, "", schema["$defs"])
    for key in ("name", "cache"):
        schema["required"].remove(key)
    del schema["$defs"]["Cache"]["required"]
    a_list = schema["properties"]["queries"]["oneOf"][0]
    a_list["items"] = {"anyOf": [{"type": "string"}, a_list["items"]]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _describe(section: dict[str, Any], prefix: str, sections: dict[str, Any]) -> None:
    """Add descriptions to the keys of a section and of the sections in it."""
    for name, key in section["properties"].items():
        key["description"] = KEYS[f"{prefix}{name}"]
        for kind in (key, *key.get("oneOf", ())):
            if reference := kind.get("$ref") or kind.get("items", {}).get("$ref"):
                inner = reference.rpartition("/")[2]
                table = " table" if inner == QueryTable.__name__ else ""
                _describe(sections[inner], f"{prefix}{name}{table}.", sections)
