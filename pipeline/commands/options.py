"""The options and arguments that commands take, with what ``--help`` and shells that complete words say of them."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Annotated

import typer

from pipeline.logs import LogFormat


def _job_files(incomplete: str) -> list[str]:
    """Return the job files that a shell may complete a word to: in the folder that it names, and one below."""
    start = glob.escape(incomplete)
    return sorted(path for pattern in ("*.y*ml", "*/*.y*ml") for path in glob.glob(f"{start}{pattern}"))


def _keys(incomplete: str) -> list[str]:
    """Return the keys of a job file that a shell may complete a word to."""
    from pipeline.job.job_schema import KEYS

    keys = [key.replace("queries table.", "queries.") for key in KEYS if not re.match(r"queries\.", key)]
    sections = {key.rpartition(".")[0] for key in keys}
    return [f"{key}=" for key in keys if key.startswith(incomplete) and key not in sections]


JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job file (YAML).", autocompletion=_job_files)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Override a key of the job file; may be repeated. A path is relative to the current folder.",
        autocompletion=_keys,
    ),
]
OneShard = Annotated[
    str | None, typer.Option("--shard", metavar="K/N", help="Only the K-th of N shares of the documents, such as 3/16.")
]
Prune = Annotated[
    bool, typer.Option("--prune", help="Remove rows of the result that the job does not ask for any more.")
]
SomeDocuments = Annotated[
    list[str] | None,
    typer.Option("--document", metavar="ID", help="This document only, or those of a pattern; may be repeated."),
]
SomeQueries = Annotated[
    list[str] | None,
    typer.Option("--query", metavar="ID", help="This query only, or those of a pattern; may be repeated."),
]
FirstDocuments = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="The first N of these documents only.")
]
ShowPrompt = Annotated[
    bool, typer.Option("--prompt", help="Print the first document's first prompt, as the model reads it, instead.")
]
Layout = Annotated[
    str | None,
    typer.Option(
        "--layout",
        metavar="LAYOUT",
        help="long: a row for each document and query; wide: for each document; batch: OpenAI's form.",
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="NAME", help="Add this column of the documents, or all; may be repeated."),
]
ResultOrJob = Annotated[Path, typer.Argument(metavar="RESULT", help="A job file or a result file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]
RetryFailed = Annotated[
    bool,
    typer.Option("--retry-failed/--keep-failed", help="Try rows that failed before again, or keep them as they are."),
]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="Stop when a row fails, with exit code 1.")]
Metrics = Annotated[
    Path | None,
    typer.Option("--metrics", metavar="FILE", help="Keep the run's numbers in this file, for Prometheus to collect."),
]
Notify = Annotated[
    str | None,
    typer.Option(
        "--notify",
        metavar="CMD",
        help="Run this command when the run has ended, however it did. Its last argument is the path of run.json.",
    ),
]
AsLog = Annotated[
    LogFormat, typer.Option("--log-format", help="What is written to stderr: lines, or a JSON object a line.")
]
On = Annotated[
    str | None,
    typer.Option("--on", metavar="RAY", help="Run on a Ray cluster: ray, or ray://HOST:PORT with its client port."),
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Load the model and measure its speed, to tell how long a run would take.")
]
Questions = Annotated[
    list[str] | None, typer.Option("--query", metavar="TEXT", help="Ask this of every document; may be repeated.")
]
Model = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="A folder or a Hugging Face repo id.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a job file that exists.")]
FirstQueries = Annotated[
    int | None, typer.Option("--queries", metavar="N", min=1, help="Ask the first N queries only.")
]
NaiveQueries = Annotated[
    int | None,
    typer.Option("--naive-queries", metavar="N", min=1, help="Have naive, which is slow, answer the first N only."),
]
Contenders = Annotated[
    list[str] | None, typer.Option("--contender", metavar="NAME", help="Run this one only; may be repeated.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no summary.")]
GOLD = "Gold answers: Parquet, JSON Lines or CSV, with document_id, query_id, answer and perhaps evidence."
GoldColumns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="NAME=COLUMN", help="A column of the gold by another name; may be repeated."),
]
Page = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page, too.")]
