"""``pipeline export``: write a result that is there in another format or layout."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from pipeline.commands.console import errors_explained, load
from pipeline.commands.options import Columns, Debug, Layout, Overrides, ResultOrJob


def export(
    result: ResultOrJob,
    to: Annotated[str, typer.Option("--to", metavar="FILE", help="*.parquet, *.csv or *.jsonl; also a URL.")],
    layout: Layout = None,
    column: Columns = None,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Write the answers that are there to Parquet, CSV or JSON Lines, also while the job runs.

    Layout and columns are those of the job's section `output`, unless they are given.
    """
    with errors_explained(debug, computes=False):
        from pipeline.errors import JobError, suggestion
        from pipeline.evaluation.source import is_result, open_result
        from pipeline.job.job import OutputLayout
        from pipeline.output.export import Export

        if layout is not None and layout not in get_args(OutputLayout):
            raise JobError(f"--layout {layout}: there is no such layout{suggestion(layout, get_args(OutputLayout))}")
        job = None if is_result(result) else load(result, set_)[0]
        columns = tuple(column or ()) or (job.output.columns if job else ())
        with open_result(result, set_ or []) as results:
            written = Export(
                results,
                job.documents if job else None,
                "wide" if (layout or (job.output.layout if job else "long")) == "wide" else "long",
                "all" if columns in ("all", ("all",)) else columns,
            ).write(to)
        print(f"{to}: {written:,} rows")
