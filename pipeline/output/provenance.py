"""The provenance of a result: model, prompt, questions and versions, for the result's metadata and run.json.

A result's bytes must not depend on when a run was interrupted, so the start of the run is in run.json alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.job.job import Job, Query
from pipeline.models.loading import resolve_model
from turboquant.runtime.versions import package_versions


def provenance(job: Job, queries: Sequence[Query]) -> dict[str, Any]:
    """Return what decides the answers of a job besides the documents and the identity, as values of JSON.

    queries: those that all documents share, with their texts and settings; none if each belongs to a document.
    """
    return {
        "model": job.model,
        "revision": _revision(job),
        "adapter": None if job.adapter is None else str(job.adapter),
        "prompt": job.prompt.model_dump(mode="json"),
        "queries": [
            {
                "id": query.id,
                "text": query.text,
                **vars(query.settings(job.generation)),
                **query.model_dump(include={"template", "when", "previous", "check", "retries"}, exclude_defaults=True),
            }
            for query in queries
        ],
        "versions": dict(package_versions()),
    }


def _revision(job: Job) -> str | None:
    """Return the commit of a model from the Hugging Face Hub, or None for a folder."""
    if Path(job.model).is_dir():
        return None
    return resolve_model(job.model, job.revision).name
