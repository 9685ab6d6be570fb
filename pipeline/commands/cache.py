"""The commands of ``pipeline cache``: list, verify and shrink the store."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.console import CommandGroup, errors_explained, size, table
from pipeline.commands.options import AsJson, Debug

BAD_FOUND = 1

app = typer.Typer(
    name="cache",
    cls=CommandGroup,
    help="Look at the store of prefixes, check it and shrink it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Where = Annotated[Path, typer.Argument(metavar="JOB|FOLDER", help="A job file, or the folder its cache.dir names.")]


@app.command("ls")
def list_(where: Where, as_json: AsJson = False, debug: Debug = False) -> None:
    """List what is stored: for which model, how big, how old, last used when, still needed or not."""
    with errors_explained(debug):
        from pipeline.cache.maintenance import list_store

        folder, _ = _store(where)
        segments = list(list_store(folder))
        if as_json:
            print(json.dumps([asdict(segment) for segment in segments], indent=1))
            return
        rows = [("key", "tokens", "size", "age", "unused for", "", "model", "document")]
        for segment in segments:
            note = segment.problem or ("needed" if segment.needed else "")
            ages = _duration(segment.age), _duration(segment.unused_for)
            numbers = f"{segment.tokens:,}", size(segment.bytes), *ages
            rows.append((segment.key[:12], *numbers, note, segment.model, segment.document))
        if segments:
            print(table(rows))
        print(f"{len(segments):,} segments, {size(sum(segment.bytes for segment in segments))} in {folder}")


@app.command()
def verify(where: Where, as_json: AsJson = False, debug: Debug = False) -> None:
    """Read every byte and compare checksums; bad segments are set aside, and the exit code is 1."""
    with errors_explained(debug):
        from pipeline.cache.maintenance import verify_store

        folder, _ = _store(where)
        report = verify_store(folder)
        if as_json:
            print(json.dumps(asdict(report), indent=1))
        else:
            rows = [("good", f"{report.good:,}"), ("bad", f"{len(report.bad):,}"), ("read", size(report.bytes))]
            print(table([*rows, *((f"  {key[:12]}", reason) for key, reason in report.bad.items())]))
        if report.bad:
            raise typer.Exit(BAD_FOUND)


@app.command()
def gc(
    where: Where,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Shrink to this: 20GB, 10% of the disk (default: the job's).")
    ] = None,
    unused_for: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Remove segments that were not used for this many days.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Remove segments that cannot be used; with a budget or --unused-for, also the least recently used.

    Segments that an unfinished job needs are kept.
    """
    with errors_explained(debug):
        from pipeline.cache.maintenance import DAY, clean_store

        folder, own_budget = _store(where, budget)
        seconds = None if unused_for is None else unused_for * DAY
        report = clean_store(folder, own_budget, seconds, dry_run)
        if as_json:
            print(json.dumps(asdict(report), indent=1))
            return
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.reasons.items())
        removed = f"{report.removed:,} segments, {size(report.removed_bytes)}{f' ({reasons})' if reasons else ''}"
        left = f"{report.left:,} segments, {size(report.left_bytes)}"
        print(table([("would remove" if dry_run else "removed", removed), ("left", left)]))


def _store(where: Path, budget: str | None = None) -> tuple[Path, int | None]:
    """Return the folder of a store and its budget in bytes. budget: replaces the budget of the job."""
    from pipeline.errors import JobError
    from pipeline.job.budget import budget_bytes, checked_budget
    from pipeline.job.job_file import load_job

    stated: int | str | None = budget
    if where.is_dir():
        folder = where
    elif where.suffix in (".yaml", ".yml"):
        job = load_job(where)
        folder, stated = job.cache.dir, budget or job.cache.budget
    else:
        raise JobError(f"{where}: neither a job file (.yaml) nor a folder")
    try:
        return folder, None if stated is None else budget_bytes(checked_budget(stated), folder)
    except ValueError as error:
        raise JobError(f"--budget: {error}") from None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
