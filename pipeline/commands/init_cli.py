"""``pipeline init`` and ``pipeline schema``: questions and arguments in, a job file or its schema out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.console import Debug, errors_explained

Questions = Annotated[
    list[str] | None, typer.Option("--query", metavar="TEXT", help="Ask this of every document; may be repeated.")
]


def init(
    documents: Annotated[
        str, typer.Argument(metavar="DOCUMENTS", help="Parquet, JSON Lines or texts: a file, a folder or a glob.")
    ],
    job_file: Annotated[Path, typer.Argument(metavar="JOB", help="The job file to write.")] = Path("job.yaml"),
    id_: Annotated[str | None, typer.Option("--id", metavar="COLUMN", help="The column of ids.")] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="COLUMN", help="The column of texts.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="A folder or a Hugging Face repo id.")
    ] = None,
    query: Questions = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a job file that exists.")] = False,
    debug: Debug = False,
) -> None:
    """Write a job file for your documents, with every key explained; on a terminal, ask what is not given.

    Beside it pipeline.schema.json is written, by which editors complete and check the file.
    """
    with errors_explained(debug, computes=False):
        from pipeline.commands.init import MODEL, QUESTION, Start, guess_columns, write_job

        id_guess, text_guess = (id_, text) if id_ and text else guess_columns(documents)
        start = Start(
            documents=documents,
            id=id_ or _asked("Column of ids", id_guess),
            text=text or _asked("Column of texts", text_guess),
            model=model or _asked("Model, a folder or a Hugging Face repo id", MODEL),
            queries=query or [_asked("First question", QUESTION)],
        )
        write_job(job_file, start, force)
        print(f"{job_file}\nnext: pipeline plan {job_file}")


def schema(debug: Debug = False) -> None:
    """Print the JSON Schema of job files, for editors and other programs."""
    with errors_explained(debug, computes=False):
        from pipeline.job.job_schema import job_schema

        print(json.dumps(job_schema(), indent=1))


def _asked(question: str, default: str) -> str:
    """What the user says, or the default where there is nobody to ask."""
    return str(typer.prompt(question, default, err=True)) if sys.stdin.isatty() else default
