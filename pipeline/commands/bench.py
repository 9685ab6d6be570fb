"""A job's own work, done by the pipeline and by plain mlx-lm in turn, each in a process of its own.

Knows the part of the job that the contenders do, and whether they agree. It does not know how a
contender does it (baselines.py), and never imports MLX but in the processes. The job's store and output are left
alone: all is written to a temporary folder beside the store, which is gone at the end.
"""

from __future__ import annotations

import logging
import signal
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline import errors
from pipeline.commands.bench_result import COLD, CONTENDERS, NAIVE, WARM, Outcome, Pair
from pipeline.errors import InputError, JobError, NotApplicable, RowError
from pipeline.job.budget import existing
from pipeline.job.job import Job, Query, QueryTable
from pipeline.run.supervisor import SPAWN, cause_of_death, receive, reraise
from pipeline.run.worker import Failed, end_with_the_parent
from pipeline.signals import stops_handled, stops_held_back

if TYPE_CHECKING:
    from pipeline.inputs.documents import Document
    from pipeline.inputs.inputs import Inputs

SMALL_CHARACTERS, SMALL_TOKENS = 1 << 16, 2  # as long as contexts for which other kernels are chosen
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extent:
    """How much of a job is done: its first documents and queries; by naive the first ``naive_queries`` alone."""

    documents: int
    queries: int | None = None
    naive_queries: int | None = None


@dataclass(frozen=True)
class Row:
    """One contender's figures; null where it failed, which ``failed`` gives the reason of, or cannot be told.

    ``applies`` is false where it is no fault that it failed: mlx-lm can't do this with this model or job.
    ``extra_bytes`` is the peak beyond what was held when the model had been loaded; ``agreement`` the share, 0 to 1, of
    the pairs answered by naive too that have the same answer.
    """

    contender: str
    resident: Literal["packed", "dense"] | None
    seconds: float | None = None
    answers: int | None = None
    answers_per_second: float | None = None
    answer_tokens: int | None = None
    tokens_per_second: float | None = None
    prefill_seconds: float | None = None
    peak_bytes: int | None = None
    extra_bytes: int | None = None
    disk_bytes: int | None = None
    agreement: float | None = None
    failed: str | None = None
    applies: bool = True

    @property
    def name(self) -> str:
        """The contender, and how prefixes are resident."""
        return _named(self.contender, self.resident)


def bench(job: Job, extent: Extent, chosen: Collection[str] = CONTENDERS) -> list[Row]:
    """Have the contenders that are chosen do a part of a job, one after the other.

    Raises JobError where a name is unknown or the job is wrong, and KeyboardInterrupt for SIGINT and SIGTERM. To be
    called from the main thread.
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
        part = _part(job, extent, folder / "documents.parquet")
        small = _small(part, folder)
        rows: list[Row] = []
        truth: dict[Pair, str] | None = None
        for contender in CONTENDERS:
            if contender not in chosen and not (contender == COLD and WARM in chosen):  # which needs its store
                continue
            for resident in _residents(contender, job):
                own = _own_job(part, contender, resident, extent, folder)
                outcome = _measure(contender, resident, own, small, folder)
                if contender == NAIVE and isinstance(outcome, Outcome):
                    truth = outcome.answers
                if contender in chosen:
                    rows.append(_row(contender, resident, outcome, truth))
        return rows


def _named(contender: str, resident: str | None) -> str:
    return f"{contender} ({resident})" if resident else contender


def _residents(contender: str, job: Job) -> tuple[Literal["packed", "dense"] | None, ...]:
    """How the pipeline holds prefixes: both ways, unless the job says how."""
    if contender not in (COLD, WARM):
        return (None,)
    return ("packed", "dense") if job.cache.resident == "auto" else (job.cache.resident,)


def _part(job: Job, extent: Extent, path: Path) -> Job:
    """The job on its first documents that can be rendered, written to ``path``, and its first queries."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.inputs.inputs import Inputs
    from pipeline.models.constraints import check_schemas

    inputs = Inputs(job)
    check_schemas(inputs.schemas)
    taken = list(islice(_rendering(job, inputs), extent.documents))
    if not taken:
        raise InputError("documents.path: there is no document that is fit for the prompt")
    pq.write_table(
        pa.Table.from_pylist([{**document.columns, job.documents.id: document.id} for document in taken]), path
    )
    documents = job.documents.model_copy(update={"path": str(path), "where": None, "limit": None})
    if documents.too_long == "split":  # which mlx-lm has nothing like
        documents = documents.model_copy(update={"too_long": "error"})
    cache = job.cache.model_copy(update={"budget": None, "keep": "always"})  # or there might be nothing to restore
    part = job.model_copy(update={"documents": documents, "cache": cache})
    return _asking(part, taken, path.with_name("queries.parquet"), lambda queries: queries[: extent.queries])


def _asking(
    part: Job, documents: Sequence[Document], path: Path, change: Callable[[Sequence[Query]], Sequence[Query]]
) -> Job:
    """The part with ``change`` of its documents' queries; where each has its own they are written to ``path``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not isinstance(part.queries, QueryTable) or part.queries.document_id is None:
        return part.model_copy(update={"queries": tuple(change(documents[0].queries))})
    asked = [(document.id, query) for document in documents for query in change(document.queries)]
    rows = [{"document_id": document_id, **query.model_dump()} for document_id, query in asked]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return part.model_copy(update={"queries": QueryTable(path=str(path), document_id="document_id")})


def _small(part: Job, folder: Path) -> Job:
    """The beginning of the part's first document, and few tokens of answers: what warms a GPU up, which compiles as it
    goes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.inputs.inputs import Inputs

    path, text = folder / "small.parquet", part.documents.text
    (first,) = pq.read_table(part.documents.path).slice(0, 1).to_pylist()
    pq.write_table(pa.Table.from_pylist([{**first, text: first[text][:SMALL_CHARACTERS]}]), path)
    documents = part.documents.model_copy(update={"path": str(path)})
    cache = part.cache.model_copy(update={"dir": folder / "small" / "cache"})
    output = part.output.model_copy(update={"path": str(folder / "small" / "answers.parquet")})
    small = part.model_copy(update={"documents": documents, "cache": cache, "output": output})
    return _asking(small, list(islice(Inputs(part).stream(), 1)), folder / "small-queries.parquet", _briefly)


def _briefly(queries: Sequence[Query]) -> list[Query]:
    return [query.model_copy(update={"max_tokens": SMALL_TOKENS}) for query in queries]


def _rendering(job: Job, inputs: Inputs) -> Iterator[Document]:
    from pipeline.inputs.prompts import Renderer

    renderer = Renderer(job.prompt)
    for document in inputs.stream():
        try:
            renderer.render(document)
        except RowError as error:
            _log.warning("document '%s' is left out: %s", document.id, error)
        else:
            yield document


def _own_job(part: Job, contender: str, resident: str | None, extent: Extent, folder: Path) -> Job:
    from pipeline.inputs.inputs import Inputs

    if contender == NAIVE:
        asked = folder / "naive-queries.parquet"
        return _asking(part, list(Inputs(part).stream()), asked, lambda queries: queries[: extent.naive_queries])
    if resident is None:
        return part
    own = folder / f"pipeline-{resident}"  # for cold and warm
    cache = part.cache.model_copy(update={"dir": own / "cache", "resident": resident})
    output = part.output.model_copy(update={"path": str(own / f"{contender}.parquet")})
    return part.model_copy(update={"cache": cache, "output": output})


def _measure(contender: str, resident: str | None, job: Job, small: Job, folder: Path) -> Outcome | Failed:
    """Have a contender do a job in a process of its own. Raises JobError where the job turns out to be wrong."""
    name = _named(contender, resident)
    _log.info("%s: started", name)
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=_compete, args=(sender, contender, job, small, folder), name=contender)
    with receiver:
        with sender, stops_held_back():  # from the process for good: it is killed where it is to stop
            process.start()
        try:
            outcome: Outcome | Failed | None = receive(receiver)  # type: ignore[assignment]
        except BaseException:
            process.kill()
            raise
        finally:
            process.join()
    if outcome is None:
        outcome = Failed(errors.PipelineError.__name__, f"its process {cause_of_death(process.exitcode or 0)}", "")
    if isinstance(outcome, Failed):
        if issubclass(getattr(errors, outcome.error), JobError):
            reraise(outcome)
        _log.info("%s: %s", name, outcome.message)
        _log.debug("%s", outcome.trace)
    else:
        left_out = f"; {outcome.left_out} left out, too long or not fit for the prompt" if outcome.left_out else ""
        _log.info("%s: %d answered in %.1f s%s", name, len(outcome.answers), outcome.seconds, left_out)
    return outcome


def _compete(connection: Connection, contender: str, job: Job, small: Job, folder: Path) -> None:
    """In a process of its own: do the job, and send what came of it."""
    end_with_the_parent()
    try:
        from turboquant.runtime.blas import load_tuned_blas

        load_tuned_blas()

        from pipeline.commands.baselines import compete

        connection.send(compete(contender, job, small, folder))
    except Exception as error:
        connection.send(Failed.of(error))


def _row(
    contender: str,
    resident: Literal["packed", "dense"] | None,
    outcome: Outcome | Failed,
    truth: dict[Pair, str] | None,
) -> Row:
    if isinstance(outcome, Failed):
        return Row(contender, resident, failed=outcome.message, applies=outcome.error != NotApplicable.__name__)
    seconds = max(outcome.seconds, 1e-9)
    same = [text == truth[pair] for pair, text in outcome.answers.items() if pair in truth] if truth else []
    return Row(
        contender,
        resident,
        seconds=outcome.seconds,
        answers=len(outcome.answers),
        answers_per_second=len(outcome.answers) / seconds,
        answer_tokens=outcome.answer_tokens,
        tokens_per_second=outcome.answer_tokens / seconds,
        prefill_seconds=outcome.prefill_seconds,
        peak_bytes=outcome.peak_bytes,
        extra_bytes=outcome.extra_bytes,
        disk_bytes=outcome.disk_bytes,
        agreement=sum(same) / len(same) if same else None,
    )
