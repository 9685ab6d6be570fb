"""``pipeline export``: write a result that is there in another format or layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, get_args

import typer

from pipeline.commands.console import errors_explained, load
from pipeline.commands.options import Columns, Debug, Layout, Overrides, ResultOrJob
from pipeline.errors import JobError, suggestion

if TYPE_CHECKING:
    from pipeline.job.job import OutputLayout


def export(
    result: ResultOrJob,
    to: Annotated[str, typer.Option("--to", metavar="FILE", help="*.parquet, *.csv or *.jsonl; also a URL.")],
    layout: Layout = None,
    column: Columns = None,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Write the answers that are there to Parquet, CSV or JSON Lines, also while the job runs.

    Layout and columns are those of the job's section `output`, unless they are given. `--layout batch` has no columns.
    """
    with errors_explained(debug, computes=False):
        from pipeline.evaluation.source import is_result, open_result
        from pipeline.output.export import Export

        job = None if is_result(result) else load(result, set_)[0]
        columns = tuple(column or ()) or (job.output.columns if job and layout != "batch" else ())
        with open_result(result, set_ or []) as results:
            written = Export(
                results,
                job.documents if job else None,
                _known_layout(layout) if layout else job.output.layout if job else "long",
                "all" if columns in ("all", ("all",)) else columns,
            ).write(to)
        print(f"{to}: {written:,} rows")


def _known_layout(name: str) -> OutputLayout:
    from pipeline.job.job import OutputLayout

    layouts: tuple[OutputLayout, ...] = get_args(OutputLayout)
    for layout in layouts:
        if layout == name:
            return layout
    raise JobError(f"--layout {name}: there is no such layout{suggestion(name, layouts)}")
