"""``pipeline show``: arguments in, answers out."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.console import Debug, JobFile, OneShard, Overrides, errors_explained, load

ShownDocuments = Annotated[
    list[str] | None, typer.Option("--document", metavar="ID", help="This document only; may be repeated.")
]
ShownQueries = Annotated[
    list[str] | None, typer.Option("--query", metavar="ID", help="This query only; may be repeated.")
]


def show(
    job_file: JobFile,
    document: ShownDocuments = None,
    query: ShownQueries = None,
    failed: Annotated[bool, typer.Option("--failed", help="Failed rows only.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Don't cut long answers on a terminal.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with filters instead.")
    ] = None,
    one_shard: OneShard = None,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each row.")] = False,
    debug: Debug = False,
) -> None:
    """Show answers: documents down, queries across; while the job runs, those that are there.

    Where the output is no terminal, a row is a line: document, query, status and answer, with tabs between.
    """
    with errors_explained(debug, computes=False):
        from pipeline.commands.show import Answers, lines, tables

        job, shard = load(job_file, set_, one_shard)
        answers = Answers(job, document or (), query or (), failed, shard)
        if html:
            from pipeline.commands.page import write_page

            write_page(html, job.name, answers)
            print(html)
        elif as_json:
            for _, rows in answers:
                for row in filter(None, rows.values()):
                    print(json.dumps(asdict(row)))
        elif sys.stdout.isatty():
            from rich.console import Console

            console = Console(highlight=False)
            for table in tables(answers, console, full):
                console.print(table)
        else:
            for line in lines(answers):
                print(line)
