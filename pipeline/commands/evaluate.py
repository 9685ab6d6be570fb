"""The arguments of ``pipeline score`` and ``pipeline compare``; their work is imported when they run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.console import errors_explained
from pipeline.commands.options import GOLD, AsJson, Debug, GoldColumns, Overrides, Page, ResultOrJob
from pipeline.logs import tell

BELOW_MINIMUM = 3


def score(
    result: ResultOrJob,
    gold: Annotated[str, typer.Option("--gold", metavar="FILE", help=GOLD)],
    least: Annotated[
        list[str] | None,
        typer.Option(
            "--min",
            metavar="METRIC=SHARE",
            help="Exit with 3 if a metric of all rows is lower, such as exact=.9; may be repeated.",
        ),
    ] = None,
    ignore_missing: Annotated[
        bool, typer.Option("--ignore-missing", help="Leave out gold answers without a row, which count as wrong.")
    ] = False,
    column: GoldColumns = None,
    html: Page = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score answers against gold answers.

    exact: the same text. normalised: without case, punctuation, English articles and superfluous spaces, as SQuAD
    compares. f1: of normalised words. number, date: the same value, where the gold answer is one. evidence_f1: of
    characters of quotations. evidence_overlap: any quotation overlaps the gold evidence. Queries with choices have a
    confusion table and the calibration of their probabilities. Failed and missing rows count as wrong. Intervals are
    of 95 %, from 1,000 resamples of documents. docs/trust.md has the definitions.
    """
    with errors_explained(debug, computes=False):
        from pipeline.commands import score as module
        from pipeline.commands.sections import as_text, write_sections
        from pipeline.evaluation.gold import read_gold
        from pipeline.evaluation.scores import score_result
        from pipeline.evaluation.source import open_result

        bounds, names = module.parse_bounds(least or []), module.parse_columns(column or [])
        right = read_gold(gold, names)
        with open_result(result, set_ or []) as results:
            scores = score_result(results, right, ignore_missing)
        sections = module.sections(scores)
        if html:
            write_sections(html, f"Scores of {result}", sections)
        print(json.dumps(asdict(scores), indent=1) if as_json else as_text(sections))
        missed = module.missed_bounds(scores, bounds)
        for message in missed:
            tell(message)
        if missed:
            raise typer.Exit(BELOW_MINIMUM)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A job file or a result file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other job file or result file.")],
    gold: Annotated[str | None, typer.Option("--gold", metavar="FILE", help=GOLD)] = None,
    column: GoldColumns = None,
    html: Page = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare two results: what made them, where they agree, and every row that differs.

    Agreement is of rows that both answered: the same text, and the same normalised text as of pipeline score. With
    gold answers: McNemar's exact test on the rows that only one result has right, and the difference of their mean F1,
    with a 95 % interval from 1,000 resamples of documents.
    """
    with errors_explained(debug, computes=False):
        from pipeline.commands import compare as module
        from pipeline.commands.score import parse_columns
        from pipeline.commands.sections import as_text, write_sections
        from pipeline.evaluation.comparison import compare_results
        from pipeline.evaluation.gold import read_gold
        from pipeline.evaluation.source import open_result

        right = read_gold(gold, parse_columns(column or [])) if gold else None
        with open_result(a) as first, open_result(b) as second:
            comparison = compare_results(first, second, right)
        sections, differences = module.sections(comparison), module.differences_section(comparison)
        if html:
            write_sections(html, f"{a} and {b}", [*sections, differences])
        if as_json:
            print(json.dumps(asdict(comparison), indent=1))
            return
        for line in module.difference_lines(comparison):
            print(line)
        print(as_text(sections))
