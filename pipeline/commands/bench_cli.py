"""``pipeline bench``: arguments in, a table and an exit code out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.console import AsJson, Debug, JobFile, Overrides, columns, errors_explained, size

if TYPE_CHECKING:
    from pipeline.commands.bench import Row

CONTENDER_FAILED = 1

First = Annotated[int | None, typer.Option("--queries", metavar="N", min=1, help="Ask the first N queries only.")]
NaiveFirst = Annotated[
    int | None,
    typer.Option("--naive-queries", metavar="N", min=1, help="Have naive, which is slow, answer the first N only."),
]
Contenders = Annotated[
    list[str] | None, typer.Option("--contender", metavar="NAME", help="Run this one only; may be repeated.")
]


def bench(
    job_file: JobFile,
    documents: Annotated[int, typer.Option(metavar="N", min=1, help="Take the job's first N documents.")] = 2,
    queries: First = None,
    naive_queries: NaiveFirst = None,
    contender: Contenders = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare the pipeline with plain mlx-lm on this machine, on a job's own documents and queries."""
    with errors_explained(debug, computes=False):
        from pipeline.commands import bench as module
        from pipeline.commands.bench_result import CONTENDERS
        from pipeline.job.job_file import load_job

        job = load_job(job_file, set_ or [])
        extent = module.Extent(documents, queries, naive_queries)
        try:
            rows = module.bench(job, extent, contender or CONTENDERS)
        except KeyboardInterrupt:
            print("interrupted; nothing was kept", file=sys.stderr)
            raise typer.Exit(130) from None
        print(json.dumps([asdict(row) for row in rows], indent=1) if as_json else _table(rows))
        if any(row.failed and row.applies for row in rows):
            raise typer.Exit(CONTENDER_FAILED)


def _table(rows: Sequence[Row]) -> str:
    rates = {row.contender: row.answers_per_second for row in rows if row.answers_per_second}
    naive, copied = rates.get("naive"), rates.get("copied")
    names = ("seconds", "answers/s", "x naive", "x copied", "tokens/s", "prefill s", "peak", "extra", "disk", "agree")
    lines: list[tuple[str, ...]] = [("contender", "resident", *names)]
    for row in rows:
        cells = (
            _number(row.seconds),
            _number(row.answers_per_second),
            _times(row.answers_per_second, naive),
            _times(row.answers_per_second, copied),
            _number(row.tokens_per_second),
            _number(row.prefill_seconds),
            *("-" if count is None else size(count) for count in (row.peak_bytes, row.extra_bytes, row.disk_bytes)),
            "-" if row.agreement is None else f"{row.agreement:.0%}",
        )
        lines.append((row.contender, row.resident or "", *cells))
    failed = [f"{row.name}: {row.failed}" for row in rows if row.failed]
    return "\n".join([columns(lines), *failed])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}"


def _times(rate: float | None, base: float | None) -> str:
    return f"{rate / base:.1f}" if rate is not None and base else "-"
