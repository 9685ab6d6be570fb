"""``pipeline bench``: do a part of a job with the pipeline and with plain mlx-lm, one contender after the other.

Each contender runs in a process of its own, by the code in baselines.py; only those processes import MLX. The job's
store and output are not touched: all files are written to a temporary folder beside the store and removed at the end.
"""

from __future__ import annotations

import logging
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import errors
from pipeline.commands.bench_result import (
    COLD,
    CONTENDERS,
    COPIED,
    NAIVE,
    WARM,
    BenchResult,
    BenchRow,
    Pair,
    Resident,
    display_name,
)
from pipeline.commands.console import size, table
from pipeline.errors import InputError, JobError, NotApplicable, RowError
from pipeline.execution.messages import Failed, receive
from pipeline.execution.processes import SPAWN, cause_of_death, end_with_parent
from pipeline.job.budget import existing
from pipeline.job.job import Job, Query, QueryTable
from pipeline.signals import stops_handled, stops_held_back

if TYPE_CHECKING:
    from pipeline.inputs.documents import Document

SMALL_CHARACTERS, SMALL_TOKENS = 1 << 16, 2  # long enough for the kernels of long contexts
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extent:
    """The part of a job that is benchmarked: its first documents and queries. None: all queries.

    naive_queries: how many queries the contender naive answers; None: all.
    """

    documents: int
    queries: int | None = None
    naive_queries: int | None = None


def bench(job: Job, extent: Extent, chosen: Collection[str] = CONTENDERS) -> list[BenchRow]:
    """Run the chosen contenders on a part of a job, one after the other. Call this from the main thread.

    Raises JobError if a contender is unknown or the job is wrong, and KeyboardInterrupt for SIGINT and SIGTERM.
    """
    if unknown := set(chosen) - set(CONTENDERS):
        raise JobError(f"--contender {min(unknown)}: there is no such contender; there are: {', '.join(CONTENDERS)}")
    if job.scale.ranks > 1:
        raise JobError("scale.ranks: the bench is of one process; --set scale.ranks=1")
    beside = existing(job.cache.dir.parent)
    with (
        stops_handled(signal.default_int_handler),
        tempfile.TemporaryDirectory(prefix=".bench-", dir=beside) as temporary,
    ):
        folder = Path(temporary)
        part = job_part(job, extent, folder / "documents.parquet")
        small = warm_up_job(part, folder)
        rows: list[BenchRow] = []
        truth: dict[Pair, str] | None = None
        for contender in CONTENDERS:
            if contender not in chosen and not (contender == COLD and WARM in chosen):  # warm needs the store of cold
                continue
            residents: tuple[Resident | None, ...] = (None,)
            if contender in (COLD, WARM):
                residents = ("packed", "dense") if job.cache.resident == "auto" else (job.cache.resident,)
            for resident in residents:
                own = contender_job(part, contender, resident, extent, folder)
                result = _run_contender(contender, resident, own, small, folder)
                if contender == NAIVE and isinstance(result, BenchResult):
                    truth = result.answers
                if contender in chosen:
                    rows.append(_bench_row(contender, resident, result, truth))
        return rows


def render(rows: Sequence[BenchRow]) -> str:
    """Return the rows as a table for people, with the speed relative to naive and to copied."""
    rates = {row.contender: row.answers_per_second for row in rows if row.answers_per_second}
    names = ("seconds", "answers/s", "x naive", "x copied", "tokens/s", "prefill s", "peak", "extra", "disk", "agree")
    lines: list[tuple[str, ...]] = [("contender", "resident", *names)]

    def relative(row: BenchRow, base: str) -> str:
        rate = row.answers_per_second
        return f"{rate / rates[base]:.1f}" if rate is not None and base in rates else "-"

    for row in rows:
        cells = (
            _number(row.seconds),
            _number(row.answers_per_second),
            relative(row, NAIVE),
            relative(row, COPIED),
            _number(row.tokens_per_second),
            _number(row.prefill_seconds),
            *("-" if count is None else size(count) for count in (row.peak_bytes, row.extra_bytes, row.disk_bytes)),
            "-" if row.agreement is None else f"{row.agreement:.0%}",
        )
        lines.append((row.contender, row.resident or "", *cells))
    return "\n".join([table(lines), *(f"{row.name}: {row.failed}" for row in rows if row.failed)])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}"


def job_part(job: Job, extent: Extent, path: Path) -> Job:
    """Return the job with its first documents that can be rendered, written to ``path``, and its first queries."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.inputs.inputs import Inputs
    from pipeline.inputs.prompts import Renderer
    from pipeline.models.constraints import check_schemas

    inputs, renderer = Inputs(job), Renderer(job.prompt, job.documents)
    check_schemas(inputs.schemas, inputs.query_with_evidence)
    taken: list[Document] = []
    for document in inputs.stream():
        try:
            renderer.render(document)
        except RowError as error:
            _log.warning("document '%s' is left out: %s", document.id, error)
            continue
        taken.append(document)
        if len(taken) == extent.documents:
            break
    if not taken:
        raise InputError("documents.path: there is no document that is fit for the prompt")
    pq.write_table(
        pa.Table.from_pylist([{**document.columns, job.documents.id: document.id} for document in taken]), path
    )
    documents = job.documents.model_copy(update={"path": str(path), "where": None, "limit": None})
    if documents.too_long == "split":  # mlx-lm has nothing like it
        documents = documents.model_copy(update={"too_long": "error"})
    cache = job.cache.model_copy(update={"budget": None, "keep": "always"})  # so that warm can restore all prefixes
    part = job.model_copy(update={"documents": documents, "cache": cache})
    return _with_queries(part, taken, path.with_name("queries.parquet"), lambda queries: queries[: extent.queries])


def _with_queries(
    part: Job, documents: Sequence[Document], path: Path, change: Callable[[Sequence[Query]], Sequence[Query]]
) -> Job:
    """Return the part with changed queries. If each document has its own queries, they are written to ``path``.

    change: returns the queries to ask in place of a document's queries.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not isinstance(part.queries, QueryTable) or part.queries.document_id is None:
        return part.model_copy(update={"queries": tuple(change(documents[0].queries))})
    pairs = [(document.id, query) for document in documents for query in change(document.queries)]
    rows = [{"document_id": document_id, **query.model_dump()} for document_id, query in pairs]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return part.model_copy(update={"queries": QueryTable(path=str(path), document_id="document_id")})


def warm_up_job(part: Job, folder: Path, characters: int = SMALL_CHARACTERS, tokens: int = SMALL_TOKENS) -> Job:
    """Return a small job that warms up a GPU: the start of the part's first document, and short answers.

    characters, tokens: the lengths of the two.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.inputs.inputs import Inputs

    path, text = folder / "small.parquet", part.documents.text
    (first,) = pq.read_table(part.documents.path).slice(0, 1).to_pylist()
    pq.write_table(pa.Table.from_pylist([{**first, text: first[text][:characters]}]), path)
    documents = part.documents.model_copy(update={"path": str(path)})
    cache = part.cache.model_copy(update={"dir": folder / "small" / "cache"})
    output = part.output.model_copy(update={"path": str(folder / "small" / "answers.parquet")})
    small = part.model_copy(update={"documents": documents, "cache": cache, "output": output})
    first_document = list(islice(Inputs(part).stream(), 1))
    return _with_queries(
        small,
        first_document,
        folder / "small-queries.parquet",
        lambda queries: [query.model_copy(update={"max_tokens": tokens}) for query in queries],
    )


def contender_job(part: Job, contender: str, resident: Resident | None, extent: Extent, folder: Path) -> Job:
    """Return the part as one contender does it, with a store and an output of its own."""
    from pipeline.inputs.inputs import Inputs

    if contender == NAIVE:
        path = folder / "naive-queries.parquet"
        return _with_queries(part, list(Inputs(part).stream()), path, lambda queries: queries[: extent.naive_queries])
    if resident is None:
        return part
    own = folder / f"pipeline-{resident}"  # for cold and warm
    cache = part.cache.model_copy(update={"dir": own / "cache", "resident": resident})
    output = part.output.model_copy(update={"path": str(own / f"{contender}.parquet")})
    return part.model_copy(update={"cache": cache, "output": output})


def _run_contender(
    contender: str, resident: Resident | None, job: Job, small: Job, folder: Path
) -> BenchResult | Failed:
    """Run a contender on a job in a process of its own. Raises JobError if the job turns out to be wrong."""
    name = display_name(contender, resident)
    _log.info("%s: started", name)
    receiver, sender = SPAWN.Pipe(duplex=False)
    started = time.monotonic()
    process = SPAWN.Process(target=_run_in_process, args=(sender, contender, job, small, folder), name=contender)
    with receiver:
        with sender, stops_held_back():  # the process ignores them for good: only its parent stops it
            process.start()
        try:
            result: BenchResult | Failed | None = receive(receiver)  # type: ignore[assignment]
        except BaseException:
            process.kill()
            raise
        finally:
            process.join()
    if result is None:
        result = Failed(errors.PipelineError.__name__, f"its process {cause_of_death(process, started)}", "")
    if isinstance(result, Failed):
        if issubclass(getattr(errors, result.error), JobError):
            result.reraise()
        _log.info("%s: %s", name, result.message)
        _log.debug("%s", result.trace)
    else:
        left_out = f"; {result.left_out} left out, too long or not fit for the prompt" if result.left_out else ""
        _log.info("%s: %d answered in %.1f s%s", name, len(result.answers), result.seconds, left_out)
    return result


def _run_in_process(connection: Connection, contender: str, job: Job, small: Job, folder: Path) -> None:
    """Run a contender in this process, and send its result or its failure."""
    end_with_parent()
    try:
        from turboquant.runtime.blas import load_tuned_blas

        load_tuned_blas()

        from pipeline.commands.baselines import run_contender

        connection.send(run_contender(contender, job, small, folder))
    except Exception as error:
        connection.send(Failed.of(error))


def _bench_row(
    contender: str, resident: Resident | None, result: BenchResult | Failed, truth: dict[Pair, str] | None
) -> BenchRow:
    """Return the figures of a result. truth: the answers of naive, if it was run."""
    if isinstance(result, Failed):
        return BenchRow(contender, resident, failed=result.message, applies=result.error != NotApplicable.__name__)
    seconds = max(result.seconds, 1e-9)
    same = [text == truth[pair] for pair, text in result.answers.items() if pair in truth] if truth else []
    return BenchRow(
        contender,
        resident,
        seconds=result.seconds,
        answers=len(result.answers),
        answers_per_second=len(result.answers) / seconds,
        answer_tokens=result.answer_tokens,
        tokens_per_second=result.answer_tokens / seconds,
        prefill_seconds=result.prefill_seconds,
        peak_bytes=result.peak_bytes,
        extra_bytes=result.extra_bytes,
        disk_bytes=result.disk_bytes,
        agreement=sum(same) / len(same) if same else None,
    )
