"""``pipeline plan --measure``: measure the speeds of a job's model by a short prefill and short answers."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from pipeline.cache.speeds import Speeds, remember_speeds
from pipeline.commands.bench import Extent, job_part, warm_up_job
from pipeline.execution.fingerprint import job_identity
from pipeline.execution.supervisor import supervise
from pipeline.job.budget import existing
from pipeline.job.job import Job

_CHARACTERS, _TOKENS = 8000, 16  # of the document, and of each answer


def measure_speeds(job: Job) -> None:
    """Answer one batch of a job's queries on the start of its first document, and keep the speeds beside its store.

    The files of this small job are in a temporary folder. Raises JobError, and the errors of `supervise`.
    """
    with tempfile.TemporaryDirectory(prefix=".measure-", dir=existing(job.cache.dir.parent)) as temporary:
        folder = Path(temporary)
        part = job_part(job, Extent(1, job.generation.batch_size), folder / "documents.parquet")
        report = supervise(warm_up_job(part, folder, _CHARACTERS, _TOKENS), quiet=True)
    remember_speeds(job.cache.dir, job_identity(job), replace(Speeds.of(report), answer_length=None))
