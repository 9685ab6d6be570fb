"""The tables of a plan and of a run that has ended: rows, what fails, and how long the work takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.commands.console import size
from pipeline.errors import redact
from pipeline.job.job import Job, QueryTable
from pipeline.report import CutAnswers, Report

if TYPE_CHECKING:
    from pipeline.commands.plan import Plan, Status

_MOST_QUERIES = 5  # of which a line is printed


def summary(job: Job, show_command: str, report: Report) -> list[tuple[str, str]]:
    """Return the lines of the table. show_command: the command that shows the answers."""
    rows = _rows(job, show_command, report)
    rows += cut_documents(report.documents_truncated, report.documents_split)
    if prefixes := report.prefixes_built + report.prefixes_restored:
        built = f"{report.prefixes_built:,} built, {report.prefixes_restored:,} restored"
        bits = f"{report.effective_bits:.2f} bits a value" if report.effective_bits else "uncompressed"
        rows.append(("prefixes", f"{built}; {size(report.prefix_bytes / prefixes)} each, {bits}"))
    if report.prefilled_tokens:
        rows.append(("prefill", _rate(report.prefilled_tokens, report.prefill_seconds, report.processes)))
    if report.answer_tokens:
        rows.append(("answers", _rate(report.answer_tokens, report.answer_seconds, report.processes)))
    if workers := report.workers.values():
        machines, lost = len({worker.host for worker in workers}), sum(worker.lost for worker in workers)
        where = f"{machines:,} machine{'s' * (machines > 1)}"
        rows.append(("workers", f"{len(workers):,} on {where}, {lost:,} of them lost"))
    elif report.restarts:
        rows.append(("restarts", f"{report.restarts:,} of the model's process, which had died"))
    rows.append(("seconds", f"{report.seconds:.1f}"))
    rows.append(("result", f"{job.result_file}.parts" if report.interrupted else redact(job.output.path)))
    rows.append(("next", show_command))
    return rows


def _rows(job: Job, show_command: str, report: Report) -> list[tuple[str, str]]:
    """Return the lines about rows."""
    answered = f"{report.rows_answered:,} answered, {report.rows_kept:,} kept, {report.rows_failed:,} failed"
    answered += f", {report.rows_skipped:,} skipped" if report.rows_skipped else ""
    documents = f"{report.documents:,} document{'s' * (report.documents != 1)}"
    rows = [("rows", f"{answered} of {report.rows:,} ({documents})")]
    for kind, count in sorted(report.failures.items()):
        rows.append(("failures", f"{count:,} {kind}, first {report.first_failures[kind]}"))
    if report.failures:
        rows.append(("", f"to see them: {show_command} --failed"))
    rows += cut_answers(job, report.cut)
    if report.cut.rows:
        rows.append(("", f"to look at them: {show_command} --cut"))
    if report.rows_beside:
        rows.append(("others", f"{report.rows_beside:,} rows left as they were"))
    return rows


def costs(job: Job, plan: Plan, run_command: str) -> list[tuple[str, str]]:
    """Return the lines of the table of a plan. run_command: the command that runs it."""
    status, about = plan.status, "about " if plan.estimated else ""
    reasons = (plan.too_long, "too long for the model"), (plan.unreadable, "blank or not fit for the prompt")
    failing = ", ".join(f"{count:,} {reason}" for count, reason in reasons if count)
    to_store, free = size(plan.bytes_to_store), size(plan.free_bytes)
    budget = f", budget {size(plan.budget_bytes)}" if plan.budget_bytes else ""
    loading = "" if plan.load_seconds is None else f", loaded in about {plan.load_seconds:,.1f} s on this machine"
    each = f" in each of {plan.processes:,} processes" if plan.processes > 1 else ""
    stages = f", in {plan.stages:,} stages: some use the answers of others" if plan.stages > 1 else ""
    return [
        ("documents", f"{status.documents:,} ({about}{plan.tokens:,} tokens, the longest {plan.longest:,})"),
        ("queries", f"{status.rows / max(status.documents, 1):,.4g} a document{stages}"),
        ("rows", f"{status.rows:,}: {status.done:,} done{skipped(status)}, {status.to_do:,} to do"),
        *([("removes", f"{plan.surplus.rows:,} rows: {plan.surplus}")] if plan.surplus.rows else []),
        ("will fail", f"documents: {failing}" if failing else "nothing known beforehand"),
        *cut_documents(plan.truncated, plan.split),
        *([("batches", plan.batching)] if plan.batching else []),
        ("weights", f"{size(plan.weights_bytes)} of memory{each}{loading}"),
        ("prefixes", f"{plan.hits:,} in the store, {plan.misses:,} to build"),
        ("prefill", f"{about}{plan.tokens_to_prefill:,} tokens"),
        ("time", time_needed(plan)),
        ("disk", f"{about}{to_store} to store, {free} free at {job.cache.dir}{budget}"),
        ("next", run_command),
    ]


def skipped(status: Status) -> str:
    """Return in words how many of the rows that are done were skipped; "" if none was."""
    return f" ({status.skipped:,} of them skipped)" if status.skipped else ""


def time_needed(plan: Plan) -> str:
    """Return how long a run would take."""
    if plan.seconds is None:
        return "not known yet: measured in the first minute, or by plan --measure"
    minutes = plan.seconds / 60
    how_long = (
        f"{minutes / 60:,.1f} h" if minutes >= 120 else f"{minutes:,.0f} min" if minutes >= 1 else "1 min or less"
    )
    at_most = " at most" if plan.answers_at_most and plan.tokens_to_answer else ""
    return f"about {how_long}{at_most}, at the speeds measured on this machine" if plan.seconds else "none"


def cut_documents(truncated: int, split: int) -> list[tuple[str, str]]:
    """Return the lines about documents that are too long for the model."""
    counts = ("truncated", truncated), ("split", split)
    return [(name, f"{count:,} documents, too long for the model") for name, count in counts if count]


def cut_answers(job: Job, cut: CutAnswers) -> list[tuple[str, str]]:
    """Return the lines about answers that `max_tokens` cut off, with advice for each query."""
    if not cut.rows:
        return []
    lines = [("cut off", f"{cut.rows:,} answers, by max_tokens; with more, only these are answered again")]
    for query_id, count in list(cut.queries.items())[:_MOST_QUERIES]:
        limit = cut.max_tokens[query_id]
        lines.append(("", f"{count:,} of query '{query_id}' at {limit:,}: {_more_tokens(job, query_id, 2 * limit)}"))
    if len(cut.queries) > _MOST_QUERIES:
        lines.append(("", f"and of {len(cut.queries) - _MOST_QUERIES:,} queries more"))
    return lines


def _more_tokens(job: Job, query_id: str, limit: int) -> str:
    """Return how to give a query more tokens."""
    if isinstance(job.queries, QueryTable):
        return f"set its max_tokens to {limit:,} in the table of queries"
    number = next(number for number, query in enumerate(job.queries) if query.id == query_id)
    return f"--set queries.{number}.max_tokens={limit}"


def _rate(tokens: int, seconds: float, processes: int) -> str:
    """Return the speed of a stage. seconds: the sum over the processes, which work side by side."""
    seconds /= processes
    return f"{tokens:,} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):,.0f} tokens/s)"
