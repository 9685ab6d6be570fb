"""``pipeline tune``: the smallest cache that keeps a job's answers, found by measuring on its own documents."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.console import INTERRUPTED, errors_explained, load, size, table
from pipeline.commands.options import AsJson, Debug, JobFile, Overrides
from pipeline.logs import tell

if TYPE_CHECKING:
    from pipeline.evaluation.tuning import Measured, Tuning

NO_SETTING = 3  # exit code
_KL = 0.001  # the bound if none is given, in nats


def tune(
    job_file: JobFile,
    kl: Annotated[
        float | None,
        typer.Option("--kl", min=0.0, metavar="NATS", help=f"The most divergence; {_KL} if no bound is given."),
    ] = None,
    top1: Annotated[
        float | None,
        typer.Option(
            "--top1", min=0.0, max=1.0, metavar="SHARE", help="The least share of answers' tokens that stay likeliest."
        ),
    ] = None,
    answers: Annotated[
        float | None,
        typer.Option("--answers", min=0.0, max=1.0, metavar="SHARE", help="The least share of answers that stay."),
    ] = None,
    documents: Annotated[int, typer.Option(metavar="N", min=1, help="Measure on the job's first N documents.")] = 3,
    queries: Annotated[int, typer.Option(metavar="N", min=1, help="Ask the first N queries of each.")] = 4,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also find bits for each layer by its own effect, which takes longer.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Write the choice into the job file.")] = False,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Find the smallest cache that keeps a job's answers, on its own documents and this machine.

    Each setting (bits of keys and values, extra_bits, with --layers bits by layer) is compared with full precision on
    greedy answers of up to 32 tokens: the divergence (KL) of predictions, the share of tokens that stay the likeliest,
    and the share of answers that stay the same. The smallest setting that keeps all bounds is chosen. A divergence
    counts with the upper end of its one-sided 95 % interval over documents. Exit code 3: no setting keeps the bounds.
    """
    with errors_explained(debug):
        from pipeline.evaluation import tuning
        from pipeline.job.edit import set_cache_keys

        job, _ = load(job_file, set_)
        bounds = tuning.Bounds(kl, top1, answers)
        if bounds == tuning.Bounds():
            bounds = replace(bounds, kl=_KL)
        try:
            tuned = tuning.tune(job, documents, queries, bounds, layers, _show_step)
        except KeyboardInterrupt:
            tell("interrupted; nothing was kept", exit_code=INTERRUPTED)
            raise typer.Exit(INTERRUPTED) from None
        print(json.dumps(asdict(tuned), indent=1) if as_json else _render(tuned))
        if tuned.chosen is None:
            tell("no setting keeps the bounds; key_bits: 16 with value_bits: 16 changes nothing", exit_code=NO_SETTING)
            raise typer.Exit(NO_SETTING)
        changes = tuned.chosen.setting.changes(job.cache)
        if write:
            changes = tuned.chosen.setting.changes(load(job_file, None)[0].cache)
        if not changes:
            tell("the job has these settings already")
        elif write:
            set_cache_keys(job_file, changes)
            tell(f"written to {job_file}; the next run answers all rows again")
        elif not as_json:
            print("\ncache: " + ", ".join(f"{key}: {json.dumps(value)}" for key, value in changes.items()))


def _show_step(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rmeasured {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or done % max(1, total // 10) == 0:
        tell(f"measured {done} of {total}")


def _render(tuned: Tuning) -> str:
    """Return the settings as a table, by size, with a mark at the chosen one."""
    heading = ("", "bits K/V", "extra_bits", "bits", "kB/token", "KL", "at most", "top-1", "answers", "seconds")
    lines = [heading, *(_line(each, each is tuned.chosen) for each in tuned.settings)]
    full = ("", "16/16", "", "16.00", f"{tuned.full_bytes_per_token / 1000:.1f}", "0", "0", "1.000", "1.000", "")
    mean = size(tuned.full_bytes_per_token * tuned.tokens / tuned.documents)
    return "\n".join(
        [
            table([*lines, full]),
            "",
            f"{tuned.documents} documents of {tuned.tokens // tuned.documents:,} tokens on average, {mean} in full "
            f"precision each; {tuned.answers} answers. seconds: to compress all documents.",
        ]
    )


def _line(each: Measured, is_chosen: bool) -> tuple[str, ...]:
    return (
        "->" if is_chosen else "",
        each.setting.name,
        f"{each.setting.extra_bits:g}",
        f"{each.bits:.2f}",
        f"{each.bytes_per_token / 1000:.1f}",
        f"{each.kl:.2g}",
        f"{each.kl_most:.2g}",
        f"{each.top1:.3f}",
        f"{each.answers:.3f}",
        f"{each.seconds:.1f}",
    )
