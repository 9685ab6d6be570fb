"""``pipeline import``: make a job of a batch file of the OpenAI API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from pipeline.commands.console import ask, command_line, errors_explained
from pipeline.commands.options import Debug, Force, Model
from pipeline.logs import tell

if TYPE_CHECKING:
    from pipeline.inputs.batch_requests import Imported


def import_batch(
    context: typer.Context,
    requests: Annotated[Path, typer.Argument(metavar="BATCH", help="JSON Lines of requests to /v1/chat/completions.")],
    job_file: Annotated[Path, typer.Argument(metavar="JOB", help="The job file to write.")] = Path("job.yaml"),
    model: Model = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Make a job of an OpenAI batch file: requests that share a long beginning become queries of one document.

    Documents and queries are written beside the job. `export --layout batch` writes the answers as such a batch does.
    """
    with errors_explained(debug, computes=False):
        from pipeline.commands.init import suitable_model
        from pipeline.inputs.batch_requests import import_requests

        imported = import_requests(requests)
        model = model or ask("Model, a folder or a Hugging Face repo id", suitable_model())
        _write(imported, job_file, model, force)
        for key, count in imported.left_out.items():
            tell(f"{requests}: `{key}` of {count:,} requests is left out: there is no such setting here")
        if imported.changed:
            tell(
                f"{requests}: in {imported.changed:,} requests a blank line takes the place of the white space between "
                "document and question"
            )
        print(
            f"{job_file}: {len(imported.documents):,} documents, {len(imported.queries):,} queries\n"
            f"next: {command_line(context, 'plan')}"
        )


def _write(imported: Imported, path: Path, model: str, force: bool) -> None:
    """Write the documents, the queries and the job. Raises JobError and OutputError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.errors import JobError
    from pipeline.files.atomic import atomic_file
    from pipeline.job.job_file import load_job

    if path.exists() and not force:
        raise JobError(f"{path}: exists already; --force replaces it")
    beside = {"documents": imported.documents, "queries": imported.queries}
    names = {kind: f"{path.stem}.{kind}.parquet" for kind in beside}
    for kind, rows in beside.items():
        columns = dict.fromkeys(key for row in rows for key in row)
        table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in columns})
        with atomic_file(path.with_name(names[kind])) as temporary:
            pq.write_table(table, temporary)
    has_system = any(document["system"] for document in imported.documents)
    job = {
        "model": os.path.relpath(model, path.parent) if os.path.isdir(model) and not os.path.isabs(model) else model,
        "documents": {"path": names["documents"]},
        "prompt": {"system": "{{ system }}" if has_system else None},
        "queries": {"path": names["queries"], "document_id": "document_id"},
        "output": {"path": f"out/{path.stem}.parquet"},
    }
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(job, allow_unicode=True, sort_keys=False), encoding="utf-8")
        try:
            load_job(temporary)
        except JobError as error:
            raise type(error)(str(error).replace(str(temporary), str(path))) from None
