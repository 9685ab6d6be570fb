"""The command line: arguments in, tables and exit codes out. Thin; everything is imported by the command that uses it.

Exit codes: 0 all rows answered; 2 the job or the command line is wrong; 3 finished, some rows failed; 130
interrupted, resumable; 1 anything else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.bench_cli import bench
from pipeline.commands.cache_cli import app as cache_app
from pipeline.commands.console import (
    AsJson,
    Debug,
    JobFile,
    OneShard,
    Overrides,
    columns,
    errors_explained,
    load,
    size,
    table,
)
from pipeline.commands.init_cli import init, schema
from pipeline.commands.show_cli import show
from pipeline.logs import LogFormat, tell

if TYPE_CHECKING:
    from pipeline.job.job import Job
    from pipeline.job.shards import Shard, ShardStatus
    from pipeline.report import Report
    from pipeline.retry import OnFailure

SOME_ROWS_FAILED = 3

app = typer.Typer(
    name="pipeline",
    help="Answer many queries on each of many long documents, on MLX.\n\n"
    "Each document is prefilled once into a compressed prompt cache that is kept on disk; every query is "
    "answered from it. Exit codes: 0 all rows answered, 2 the job or the command line is wrong, 3 finished "
    "but some rows failed, 130 interrupted (the same command resumes), 1 anything else.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cache_app)

RetryFailed = Annotated[
    bool,
    typer.Option("--retry-failed/--keep-failed", help="Try rows that failed before again, or keep them as they are."),
]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="Stop when a row fails, with exit code 1.")]
Metrics = Annotated[
    Path | None,
    typer.Option("--metrics", metavar="FILE", help="Keep the run's numbers in this file, for Prometheus to collect."),
]
AsLog = Annotated[
    LogFormat, typer.Option("--log-format", help="What is written to stderr: lines, or a JSON object a line.")
]
On = Annotated[
    str | None,
    typer.Option("--on", metavar="RAY", help="Run on a Ray cluster: ray, or ray://HOST:PORT with its client port."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no summary.")]


@app.command()
def run(
    job_file: JobFile,
    one_shard: OneShard = None,
    on: On = None,
    set_: Overrides = None,
    retry_failed: RetryFailed = True,
    fail_fast: FailFast = False,
    metrics: Metrics = None,
    log_format: AsLog = LogFormat.text,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a job, or resume it: the same command. Rows that are answered already are kept."""
    with errors_explained(debug, quiet, computes=on is not None, log_format=log_format):
        from pipeline.models.ranks import is_rank_worker
        from pipeline.retry import OnFailure

        job, shard = load(job_file, set_, one_shard)
        if on is None and is_rank_worker(job):
            _follow(job)
            return
        named = f"{job_file} --shard {shard}" if shard else str(job_file)
        again = f"pipeline run {named} --on {on}" if on else f"pipeline run {named}"
        shows_nothing = quiet or (as_json and log_format is LogFormat.text)
        on_failure = OnFailure(keep=not retry_failed, stop=fail_fast)
        report = _run(job, on, shows_nothing, on_failure, metrics, shard)
        _tell(job, named, report, quiet, as_json)
        if report.stopped_at:
            tell(f"stopped at the first failure: {report.stopped_at}; to resume: {again}", exit_code=1)
            raise typer.Exit(1)
        if report.interrupted:
            tell(f"interrupted; to resume: {again}", exit_code=130)
            raise typer.Exit(130)
        if report.rows_failed:
            raise typer.Exit(SOME_ROWS_FAILED)


@app.command()
def merge(
    job_file: JobFile, set_: Overrides = None, quiet: Quiet = False, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Write a job's result from those of its shards, when all are done."""
    with errors_explained(debug, quiet):
        from pipeline.commands.merge import merge_shards

        job, _ = load(job_file, set_)
        report = merge_shards(job, quiet or as_json)
        _tell(job, str(job_file), report, quiet, as_json)
        if report.rows_failed:
            raise typer.Exit(SOME_ROWS_FAILED)


@app.command()
def plan(
    job_file: JobFile,
    one_shard: OneShard = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check everything and say what a run would cost, without loading weights."""
    with errors_explained(debug):
        from pipeline.commands.plan import plan_job

        job, shard = load(job_file, set_, one_shard)
        found = plan_job(job, quiet=as_json, shard=shard)
        about = "about " if found.estimated else ""
        if as_json:
            print(json.dumps(asdict(found), indent=1))
            return
        print(
            table(
                (
                    "documents",
                    f"{found.status.documents:,} ({about}{found.tokens:,} tokens, the longest {found.longest:,})",
                ),
                ("queries", f"{found.status.rows / max(found.status.documents, 1):,.4g} a document"),
                ("rows", f"{found.status.rows:,}: {found.status.done:,} done, {found.status.left:,} to do"),
                ("will fail", _will_fail(found.too_long, found.unreadable)),
                *_cut(found.truncated, found.split),
                ("prefixes", f"{found.hits:,} in the store, {found.misses:,} to build"),
                ("prefill", f"{about}{found.tokens_to_prefill:,} tokens"),
                (
                    "disk",
                    f"{about}{size(found.bytes_to_store)} to store, {size(found.free_bytes)} free at {job.cache.dir}"
                    + (f", budget {size(found.budget_bytes)}" if found.budget_bytes else ""),
                ),
            )
        )


@app.command()
def status(
    job_file: JobFile,
    one_shard: OneShard = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Count a job's rows: done, failed, left. Of its shards too, as their runs last wrote."""
    with errors_explained(debug):
        from pipeline.commands.plan import job_status
        from pipeline.job.shards import shard_statuses

        job, shard = load(job_file, set_, one_shard)
        found = job_status(job, quiet=as_json, shard=shard)
        shards = list(shard_statuses(job.result_file))
        if as_json:
            told = {"shards": [asdict(each) for each in shards]} if shards else {}
            print(json.dumps({**asdict(found), "left": found.left, **told}, indent=1))
        else:
            counts = f"{found.rows:,}: {found.done:,} done, {found.failed:,} failed, {found.left:,} left"
            print(table(("documents", f"{found.documents:,}"), ("rows", counts)))
            if shards:
                print(f"\n{_shards(shards)}")


app.command()(show)
app.command()(init)
app.command()(schema)
app.command()(bench)


@app.command()
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Show device, BLAS, versions and measured speed, and what to fix."""
    with errors_explained(debug):
        from pipeline.commands import doctor as module

        checks = module.examine()
        print(module.as_json(checks) if as_json else module.render(checks))


def main() -> None:
    """The console script."""
    app(prog_name="pipeline")


def _shards(shards: Sequence[ShardStatus]) -> str:
    heading = ("shard", "state", "rows", "done", "failed", "left", "updated")
    return columns([heading, *([str(value) for value in vars(shard).values()] for shard in shards)])


def _follow(job: Job) -> None:
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    from pipeline.distributed.rank_worker import follow

    follow(job)


def _run(
    job: Job, on: str | None, quiet: bool, on_failure: OnFailure, metrics: Path | None, shard: Shard | None
) -> Report:
    """Run the job on this machine, or on a cluster."""
    if on is not None:
        from pipeline.distributed.ray_cluster import run_on_ray

        return run_on_ray(job, on, quiet, on_failure, metrics, shard)
    from pipeline.run.supervisor import supervise

    return supervise(job, quiet, on_failure, metrics, shard)


def _tell(job: Job, named: str, report: Report, quiet: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(report), indent=1))
    elif not quiet:
        print(_summary(job, named, report))


def _summary(job: Job, named: str, report: Report) -> str:
    answered = f"{report.rows_answered:,} answered, {report.rows_kept:,} kept, {report.rows_failed:,} failed"
    rows = [("rows", f"{answered} of {report.rows:,} ({report.documents:,} documents)")]
    for kind, count in sorted(report.failures.items()):
        rows.append(("failures", f"{count:,} {kind}, first {report.first_failures[kind]}"))
    if report.failures:
        rows.append(("", f"to see them: pipeline show {named} --failed"))
    rows += _cut(report.documents_truncated, report.documents_split)
    if prefixes := report.prefixes_built + report.prefixes_restored:
        built = f"{report.prefixes_built:,} built, {report.prefixes_restored:,} restored"
        bits = f"{report.effective_bits:.2f} bits a value" if report.effective_bits else "uncompressed"
        rows.append(("prefixes", f"{built}; {size(report.prefix_bytes / prefixes)} each, {bits}"))
    if report.prefilled_tokens:
        rows.append(("prefill", _rate(report.prefilled_tokens, report.prefill_seconds)))
    if report.answer_tokens:
        rows.append(("answers", _rate(report.answer_tokens, report.answer_seconds)))
    if workers := report.workers.values():
        machines, lost = len({worker.host for worker in workers}), sum(worker.lost for worker in workers)
        where = f"{machines:,} machine{'s' * (machines > 1)}"
        rows.append(("workers", f"{len(workers):,} on {where}, {lost:,} of them lost"))
    elif report.restarts:
        rows.append(("restarts", f"{report.restarts:,} of the model's process, which had died"))
    rows.append(("seconds", f"{report.seconds:.1f}"))
    rows.append(("result", f"{job.result_file}.parts" if report.interrupted else job.output.path))
    return table(*rows)


def _will_fail(too_long: int, unreadable: int) -> str:
    reasons = (too_long, "too long for the model"), (unreadable, "blank or not fit for the prompt")
    counted = [f"{count:,} {reason}" for count, reason in reasons if count]
    return f"documents: {', '.join(counted)}" if counted else "nothing known beforehand"


def _cut(truncated: int, split: int) -> list[tuple[str, str]]:
    counts = ("truncated", truncated), ("split", split)
    return [(name, f"{count:,} documents, too long for the model") for name, count in counts if count]


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):,.0f} tokens/s)"


if __name__ == "__main__":
    main()
