"""Fingerprints are in result files, so their values must not change."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import pytest

from pipeline.execution.fingerprint import RowFingerprints
from pipeline.inputs.prompts import Rendered
from pipeline.inputs.questions import Question
from pipeline.job.job_file import load_job
from tests.pipeline.workplace import Workplace
from turboquant.io.identity import Identity


@pytest.mark.parametrize("system", [None, 'Été ["]'])
@pytest.mark.parametrize("context", ["", "a]", '日本 \ud800 "]\n['])
@pytest.mark.parametrize("former", [False, True])
def test_a_rows_fingerprint_digests_one_json_list(
    workplace: Workplace, system: str | None, context: str, former: bool
) -> None:
    workplace.queries.append({"id": "odd", "text": "[é]?", "temperature": 0.5, "seed": 7})
    job, identity = load_job(workplace.save(), []), Identity("w", "t", "c", "exact 512")
    rendered = Rendered(system, context)
    of_rows = RowFingerprints(identity, rendered, job.generation)
    found = {query.id: of_rows.of(query, Question(query.text), former) for query in job.queries}
    for query in job.queries:
        settings = query.settings(job.generation).deciding
        if not former:
            del settings["max_tokens"]
        fields = ["row", asdict(identity), system, context, query.text, settings]
        whole = json.dumps(fields, sort_keys=True).encode()
        assert found[query.id] == hashlib.sha256(whole).hexdigest()[:32]
    assert len(set(found.values())) == len(found) == 4
