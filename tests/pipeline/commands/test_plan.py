"""`plan` and `status`: their counts are right, they load no weights, and they change nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.speeds import Speeds, remember_speeds
from pipeline.commands.plan import job_status, plan_job
from pipeline.errors import JobError
from pipeline.execution.fingerprint import job_identity
from pipeline.inputs.prompts import PromptTokenizer
from pipeline.inputs.token_counter import Effort
from pipeline.job.job import EVIDENCE_TURN_TOKENS, Job
from pipeline.job.job_file import load_job
from pipeline.report import Report
from tests.pipeline.command_line import invoke
from tests.pipeline.workplace import Workplace


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No plan loads weights; a run in between may."""
    monkeypatch.setattr("turboquant.mlx_lm.internals.load", None)


@pytest.fixture
def run(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    import mlx_lm.utils

    def allowed() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("turboquant.mlx_lm.internals.load", mlx_lm.utils.load)
            workplace.run()

    return allowed


def job(workplace: Workplace, *overrides: str) -> Job:
    return load_job(workplace.save(), overrides)


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_plan_before_and_after_a_run(workplace: Workplace, run: Callable[[], None]) -> None:
    plan = plan_job(job(workplace))
    assert (plan.status.documents, plan.status.rows, plan.status.done, plan.status.left) == (3, 9, 0, 9)
    assert (plan.hits, plan.misses) == (0, 3)
    run()
    contexts = {row["document_id"]: row["context_tokens"] for row in workplace.rows().values()}
    assert plan.tokens == plan.tokens_to_prefill == sum(contexts.values())
    assert plan.longest == max(contexts.values())
    after = plan_job(job(workplace))
    assert (after.hits, after.misses, after.tokens_to_prefill, after.bytes_to_store) == (3, 0, 0, 0)
    assert (after.tokens, after.status.done, after.status.left) == (plan.tokens, 9, 0)
    workplace.documents["d3"] = "One more. " * 40
    grown = plan_job(job(workplace))
    assert (grown.hits, grown.misses, grown.status.left) == (3, 1, 3)
    assert grown.tokens_to_prefill == grown.tokens - plan.tokens > 0


def speeds_known(workplace: Workplace, speeds: Speeds, *overrides: str) -> None:
    remember_speeds(workplace.cache, job_identity(job(workplace, *overrides)), speeds)


def seconds(workplace: Workplace, *options: str) -> float | None:
    told: float | None = json.loads(invoke("plan", workplace.save(), "--json", *options).stdout)["seconds"]
    return told


def test_a_plan_tells_how_long_a_run_would_take(workplace: Workplace) -> None:
    assert "not known yet: measured in the first minute" in invoke("plan", workplace.save()).stdout
    tokens = plan_job(job(workplace)).tokens_to_prefill
    speeds_known(workplace, Speeds(prefill=tokens / 600, answer=0.25))
    assert seconds(workplace) == pytest.approx(600 + 3 * (5 + 3 + 5) / 0.25)
    assert "about 13 min at most, at the speeds measured on this machine" in invoke("plan", workplace.save()).stdout
    speeds_known(workplace, Speeds(answer_length=4))
    assert seconds(workplace) == pytest.approx(600 + 3 * (4 + 3 + 4) / 0.25)
    assert "about 12 min, at the speeds" in invoke("plan", workplace.save()).stdout


def test_speeds_of_another_codec_or_a_damaged_file_say_nothing(workplace: Workplace) -> None:
    speeds_known(workplace, Speeds(prefill=10, answer=10))
    assert seconds(workplace) is not None
    assert seconds(workplace, "--set", "cache.key_bits=3") is None
    file = workplace.cache / "speeds.json"
    for damaged in (file.read_text().replace("10", "99"), "{", ""):
        file.write_text(damaged)
        assert seconds(workplace) is None


def test_a_run_measures_for_the_next_plan(workplace: Workplace, run: Callable[[], None]) -> None:
    assert "loaded in" not in invoke("plan", workplace.save()).stdout
    run()
    assert re.search(r"of memory, loaded in about \d+\.\d s on this machine", invoke("plan", workplace.save()).stdout)
    assert seconds(workplace) == 0
    workplace.documents["d3"] = "One more. " * 40
    assert (seconds(workplace) or 0) > 0


def test_a_plan_may_measure(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.documents = {"long": "A long paper. " * 10_000}
    measured: list[Job] = []

    def supervise(small: Job, quiet: bool) -> Report:
        measured.append(small)
        return Report(
            prefilled_tokens=100,
            context_tokens=100,
            prefill_seconds=2,
            rows_answered=3,
            answer_tokens=9,
            answer_seconds=3,
        )

    monkeypatch.setattr("pipeline.commands.measure.supervise", supervise)
    before = set(workplace.folder.iterdir())
    told = seconds(workplace, "--measure", "--set", "documents.too_long=truncate")
    plan = plan_job(job(workplace, "documents.too_long=truncate"))
    assert told == pytest.approx(plan.tokens_to_prefill / 50 + (5 + 3 + 5) / 3)
    (small,) = measured
    assert small.cache.dir != workplace.cache
    assert set(workplace.folder.iterdir()) - before == {workplace.cache}


def test_a_plan_that_measures_runs_the_model(workplace: Workplace) -> None:
    told = invoke("plan", workplace.save(), "--measure")
    assert "time       about 1 min or less at most" in told.stdout, told.output
    assert not workplace.output.exists()


def test_answered_documents_need_no_prefix(workplace: Workplace, run: Callable[[], None]) -> None:
    run()
    shutil.rmtree(workplace.cache)
    plan = plan_job(job(workplace))
    assert (plan.hits, plan.misses, plan.tokens_to_prefill) == (0, 0, 0)
    workplace.queries.append({"id": "new", "text": "Why?"})
    plan = plan_job(job(workplace))
    assert (plan.misses, plan.tokens_to_prefill) == (3, plan.tokens)


def test_documents_of_the_same_text_are_prefilled_once(workplace: Workplace) -> None:
    workplace.documents["d2"] = workplace.documents["d0"]
    plan = plan_job(job(workplace))
    assert plan.misses == 2
    assert plan.tokens_to_prefill < plan.tokens


def test_the_tokens_are_a_runs_however_a_document_ends(workplace: Workplace, run: Callable[[], None]) -> None:
    endings = ["", ".", "...", "\n", ".\n\n\n", " ", "(x)", "1", "é", "<|end|>", "end|>", "\n- ", "日本", "!?"]
    workplace.documents = {str(number): f"The board met{ending}" for number, ending in enumerate(endings)}
    plan = plan_job(job(workplace))
    run()
    contexts = [row["context_tokens"] for row in workplace.rows().values() if row["query_id"] == "what"]
    assert (plan.tokens, plan.longest) == (sum(contexts), max(contexts))
    # Two texts share a prefix where they differ in what is no longer context; a plan cannot tell from the text.
    assert plan.misses == len(endings) == len(workplace.segments()) + 1


def test_stored_contexts_are_not_tokenised_again(
    workplace: Workplace, run: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.documents["d2"] = workplace.documents["d0"]
    before = plan_job(job(workplace))
    run()
    workplace.documents["new"] = "A new one."
    counted: list[str] = []
    count = PromptTokenizer.count
    monkeypatch.setattr(PromptTokenizer, "count", lambda self, texts: counted.extend(texts) or count(self, texts))
    monkeypatch.setattr("pipeline.cache.hit_index._FIRST_CHECKS", 0)
    plan = plan_job(job(workplace))
    assert (plan.hits, plan.misses) == (2, 1)
    assert plan.tokens - plan.tokens_to_prefill == before.tokens
    assert len(counted) == 1
    assert "A new one." in counted[0]


def test_a_stored_context_that_ends_elsewhere_is_no_hit(
    workplace: Workplace, run: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.queries = workplace.queries[:1]
    workplace.queries[0]["max_tokens"] = 1
    workplace.documents = {str(number): f"Paper {number}." for number in range(40)}
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.inputs.prompts._PROBES", ())
        run()
        assert plan_job(job(workplace)).hits == 40
    workplace.queries.append({"id": "new", "text": "Why?"})
    plan = plan_job(job(workplace))
    assert (plan.hits, plan.misses, plan.tokens_to_prefill) == (0, 40, plan.tokens)
    run()
    assert len(workplace.segments()) == 80
    again = plan_job(job(workplace))
    assert (again.hits, again.misses, again.tokens) == (40, 0, plan.tokens)


def test_contexts_of_another_identity_are_no_hits(workplace: Workplace, run: Callable[[], None]) -> None:
    run()
    plan = plan_job(job(workplace, "cache.key_bits=3"))
    assert (plan.hits, plan.misses) == (0, 3)
    (workplace.segments()[0] / "segment.json").write_text("broken")
    assert plan_job(job(workplace)).hits == 2


def test_a_plan_beyond_the_effort_is_estimated(workplace: Workplace) -> None:
    for number in range(8):
        workplace.documents[f"e{number}"] = f"Paper {number}. The board met and decided the budget. " * (9 + number)
    workplace.documents |= {"long": "The board met. " * 1900, "blank": " "}
    exact = plan_job(job(workplace))
    about = plan_job(job(workplace), effort=Effort(0, 0))
    assert (exact.estimated, about.estimated) == (False, True)
    assert about.status == exact.status
    assert (about.misses, about.too_long, about.unreadable) == (exact.misses, 1, 1) == (11, 1, 1)
    assert about.tokens == pytest.approx(exact.tokens, rel=0.5)
    assert about.tokens != exact.tokens


@pytest.mark.parametrize("evidence", [0, 1, 3])
@pytest.mark.parametrize("effort", [Effort(), Effort(0, 1 << 20)], ids=["counted", "estimated"])
def test_the_last_token_that_fits(workplace: Workplace, run: Callable[[], None], effort: Effort, evidence: int) -> None:
    workplace.queries = workplace.queries[:1]
    workplace.documents = {"first": "The board met; twice! " * 20, "near": "The board met; twice! " * 100}
    run()
    row = workplace.rows()["near", "what"]
    shutil.rmtree(workplace.cache)
    most = 2048 - row["context_tokens"] - row["query_tokens"] - evidence * EVIDENCE_TURN_TOKENS
    workplace.queries[0]["evidence"] = evidence
    for max_tokens, too_long in (most, 0), (most + 1, 1):
        workplace.queries[0]["max_tokens"] = max_tokens
        assert plan_job(job(workplace), effort=effort).too_long == too_long


@pytest.mark.parametrize(
    "cache",
    [
        {},
        {"key_bits": 3, "value_bits": 2},
        {"window": 0},
        {"key_bits": 8, "sinks": 0},
        {"key_bits": 16, "value_bits": 16},
        {"layer_bits": {-1: 8}},
    ],
)
def test_bytes_to_store_are_near_the_real_ones(
    workplace: Workplace, run: Callable[[], None], cache: dict[str, Any]
) -> None:
    workplace.tree["cache"] = {"dir": "cache"} | cache
    workplace.documents = {"long": "The board met on the third of May and decided it. " * 125}
    planned = plan_job(job(workplace))
    run()
    stored = sum(path.stat().st_size for path in workplace.segments()[0].iterdir())
    assert planned.tokens > 1500
    assert planned.bytes_to_store == pytest.approx(stored, rel=0.05)


def test_rows_that_will_fail_are_foreseen(workplace: Workplace, run: Callable[[], None]) -> None:
    workplace.documents |= {"long": "The board met. " * 900, "blank": " "}
    plan = plan_job(job(workplace))
    assert (plan.too_long, plan.unreadable, plan.misses) == (1, 1, 3)
    run()
    assert sum(row["status"] == "error" for row in workplace.rows().values()) == 6
    status = job_status(job(workplace))
    assert (status.rows, status.done, status.failed, status.left, status.to_do) == (15, 9, 6, 0, 6)


def test_one_query_too_long_leaves_the_others(workplace: Workplace) -> None:
    workplace.queries[0]["max_tokens"] = 2000
    plan = plan_job(job(workplace))
    assert (plan.too_long, plan.misses) == (3, 3)


def test_status_counts_rows_that_are_still_valid(workplace: Workplace, run: Callable[[], None]) -> None:
    assert (job_status(job(workplace)).done, job_status(job(workplace)).left) == (0, 9)
    run()
    assert job_status(job(workplace)).done == 9
    workplace.documents["d1"] += "Changed."
    workplace.queries[0]["temperature"] = 1.0
    assert job_status(job(workplace)).done == 4
    assert job_status(job(workplace, "cache.key_bits=3")).done == 0


def test_plan_and_status_change_nothing(workplace: Workplace, run: Callable[[], None]) -> None:
    job(workplace)
    before = files(workplace.folder)
    plan_job(load_job(workplace.job_file))
    job_status(load_job(workplace.job_file))
    assert files(workplace.folder) == before
    run()
    (workplace.segments()[0] / "segment.json").write_text("broken")
    Path(f"{workplace.output}.parts").mkdir()
    before = files(workplace.folder)
    plan_job(load_job(workplace.job_file))
    job_status(load_job(workplace.job_file))
    assert files(workplace.folder) == before


def test_a_model_without_weights_is_an_error(workplace: Workplace, tmp_path: Path) -> None:
    model = shutil.copytree(workplace.model, tmp_path / "bare")
    (model / "model.safetensors").unlink()
    workplace.tree["model"] = str(model)
    for look in (plan_job, job_status):
        with pytest.raises(JobError, match="no weights"):
            look(job(workplace))


@pytest.mark.parametrize("command", ["plan", "status", "run"])
def test_bits_of_a_layer_that_the_model_does_not_have_are_an_error(workplace: Workplace, command: str) -> None:
    workplace.tree["cache"]["layer_bits"] = {40: 8}
    found = invoke(command, workplace.save())
    assert found.exit_code == 2
    assert "cache.layer_bits names layer 40, but the model has 1 layer: 0 to 0" in " ".join(found.stderr.split())


def test_importing_loads_no_mlx() -> None:
    """The tuned BLAS must come before MLX, so no module may import it on the way."""
    code = "import json, sys, pipeline.commands.plan, pipeline.execution.runner; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"mlx.core", "mlx_lm", "transformers"} & set(json.loads(done.stdout))
