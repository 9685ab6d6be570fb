"""The check at the end of a run: each row of the result must have the fingerprint that the job gives it then.

A run takes hours, and its inputs may change meanwhile. So all documents are read and rendered once more before the
result is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from pipeline.errors import JobError, OutputError
from pipeline.execution.fingerprint import job_identity
from pipeline.execution.planner import TaskPlanner
from pipeline.inputs.inputs import Inputs
from pipeline.job.job import Job
from pipeline.output.results import Results
from turboquant.io.identity import Identity


def current_fingerprints(
    job: Job, inputs: Inputs, identity: Identity, planner: TaskPlanner, results: Results
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield each document's id with the fingerprints that its rows must have now, by query id, in input order.

    inputs, identity: as they were when the run started. results: have the answers that queries use. Raises OutputError
    if the model, the queries or the files of documents changed since then.
    """
    try:
        now = asdict(job_identity(job))
        changed = [f"the model's {name}" for name, value in asdict(identity).items() if now[name] != value]
        if inputs.queries_changed():
            changed.append("the table of queries")
        if changed:
            raise OutputError(
                f"{' and '.join(changed)} changed while the job ran, so no result is written; the same "
                "command goes on, and answers again what that changes"
            )
        for document in inputs.stream():
            yield document.id, planner.fingerprints(document, results.rows(document.id))
    except JobError as error:
        raise OutputError(f"the job's inputs changed while it ran: {error}") from error
