"""Whole runs on a tiny model: what is computed, what is kept, and that a result never depends on how it came about."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import pipeline.cache.store
import pipeline.execution.engine
import pipeline.execution.prefixes
from pipeline.errors import ModelError, OutputError
from tests import ROOT, warm
from tests.pipeline.workplace import Interrupting, Workplace
from turboquant.mlx_lm.families import Support
from turboquant.runtime.versions import package_versions


def counts(report: Any) -> tuple[int, int, int, int, int]:
    """Rows kept, answered and failed; prefixes built and restored."""
    return (
        report.rows_kept,
        report.rows_answered,
        report.rows_failed,
        report.prefixes_built,
        report.prefixes_restored,
    )


# ---- what a run gives


def test_every_pair_is_one_row_in_input_order(workplace: Workplace) -> None:
    report = workplace.run()
    assert list(workplace.rows()) == [(d, q["id"]) for d in workplace.documents for q in workplace.queries]
    rows = workplace.rows().values()
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["answer_tokens"] <= (3 if row["query_id"] == "when" else 5) for row in rows)
    assert all(row["finish_reason"] in ("stop", "length") for row in rows)
    assert all(row["error"] is None and row["context_tokens"] > 100 for row in rows)
    # The garbage tells contexts and queries apart, or the tests below would prove little.
    assert len(set(workplace.answers().values())) == 9
    assert counts(report) == (0, 9, 0, 3, 0)
    assert report.answer_tokens == sum(row["answer_tokens"] for row in rows)
    assert report.prefilled_tokens == sum({row["document_id"]: row["context_tokens"] for row in rows}.values())


def test_the_report_beside_the_result(workplace: Workplace, tiny_model: Path) -> None:
    report = workplace.run()
    written = workplace.report()
    assert written["rows_answered"] == 9
    assert written["prefixes_built"] == 3
    assert written["prefix_bytes"] == report.prefix_bytes > 0
    assert written["versions"] == package_versions()
    metadata = pq.ParquetFile(workplace.output).schema_arrow.metadata
    assert metadata[b"pipeline.weights"].decode() == written["identity"]["weights"]
    assert not Path(f"{workplace.output}.parts").exists()


def test_stop_tokens_end_an_answer_and_count_in_the_fingerprint(workplace: Workplace) -> None:
    from pipeline.models.loading import load_tokenizer

    workplace.queries[0]["max_tokens"] = 1
    workplace.run()
    first, tokenizer = workplace.answers()["d0", "what"], load_tokenizer(workplace.model)
    stops = [token for token in range(len(tokenizer)) if tokenizer.decode([token]).strip() == first]
    model = shutil.copytree(workplace.model, workplace.folder / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    workplace.tree["model"] = str(model)
    assert workplace.run().rows_answered == 9
    stopped = workplace.rows()["d0", "what"]
    assert (stopped["finish_reason"], stopped["answer"], stopped["answer_tokens"]) == ("stop", "", 0)


# ---- warm equals cold


def test_restored_prefixes_give_the_same_bytes(workplace: Workplace, prefilled: list[int]) -> None:
    workplace.run()
    cold = workplace.output.read_bytes()
    workplace.output.unlink()
    assert counts(workplace.run()) == (0, 9, 0, 0, 3)
    assert workplace.output.read_bytes() == cold
    assert len(prefilled) == 3
    shutil.rmtree(workplace.cache)
    workplace.output.unlink()
    workplace.run()
    assert workplace.output.read_bytes() == cold


def test_nothing_is_computed_twice(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.run()
    before = workplace.output.read_bytes()
    monkeypatch.setattr("pipeline.execution.engine.load_identified", None)
    assert counts(workplace.run()) == (9, 0, 0, 0, 0)
    assert workplace.output.read_bytes() == before


def test_an_added_query_costs_its_rows_only(workplace: Workplace, prefilled: list[int]) -> None:
    workplace.run()
    old = workplace.rows()
    workplace.queries.insert(1, {"id": "new", "text": "Is the café open?"})
    assert counts(workplace.run()) == (9, 3, 0, 0, 3)
    assert len(prefilled) == 3
    assert {pair: row for pair, row in workplace.rows().items() if pair[1] != "new"} == old
    assert [query for _, query in workplace.rows()][:4] == ["what", "new", "when", "who"]


def test_a_changed_text_costs_its_document_only(workplace: Workplace) -> None:
    workplace.run()
    old = workplace.rows()
    workplace.documents["d1"] = "x " + workplace.documents["d1"]
    assert counts(workplace.run()) == (6, 3, 0, 1, 0)
    changed = {pair for pair, row in workplace.rows().items() if row != old[pair]}
    assert changed == {("d1", query["id"]) for query in workplace.queries}


def test_changed_settings_cost_their_rows_only(workplace: Workplace) -> None:
    workplace.run()
    workplace.queries[1]["max_tokens"] = 2
    assert counts(workplace.run()) == (6, 3, 0, 0, 3)
    assert all(row["answer_tokens"] <= 2 for (_, query), row in workplace.rows().items() if query == "when")


def test_removed_queries_and_documents_disappear(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.run()
    old = workplace.rows()
    del workplace.documents["d1"], workplace.queries[0]
    monkeypatch.setattr("pipeline.execution.engine.load_identified", None)
    assert counts(workplace.run()) == (4, 0, 0, 0, 0)
    left = [("d0", "when"), ("d0", "who"), ("d2", "when"), ("d2", "who")]
    assert workplace.rows() == {pair: old[pair] for pair in left}


def test_the_order_of_documents_is_the_input_s(workplace: Workplace) -> None:
    workplace.run()
    workplace.documents = dict(reversed(workplace.documents.items()))
    assert counts(workplace.run()) == (9, 0, 0, 0, 0)
    assert [document for document, _ in workplace.rows()][::3] == ["d2", "d1", "d0"]


def test_documents_of_the_same_text_share_a_prefix(workplace: Workplace) -> None:
    workplace.documents["d2"] = workplace.documents["d0"]
    assert counts(workplace.run()) == (0, 9, 0, 2, 1)
    assert workplace.rows()["d2", "what"]["answer"] == workplace.rows()["d0", "what"]["answer"]


# ---- generation


def test_batch_size_changes_no_greedy_answer(workplace: Workplace) -> None:
    workplace.queries += [{"id": str(n), "text": f"What of ({n})?", "max_tokens": n} for n in range(3, 10)]
    workplace.run("generation.batch_size=8")
    together = workplace.answers()
    workplace.output.unlink()
    workplace.run("generation.batch_size=1")
    assert workplace.answers() == together


def test_samples_depend_on_their_own_seed_alone(workplace: Workplace) -> None:
    workplace.tree["generation"] = {"max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 7}
    workplace.run()
    first = workplace.answers()
    workplace.output.unlink()
    workplace.run("generation.batch_size=1")
    assert workplace.answers() == first
    # Beside other rows, in another order, in other company.
    workplace.output.unlink()
    workplace.queries = [{"id": "greedy", "text": "Why?", "temperature": 0}, *reversed(workplace.queries)]
    del workplace.documents["d0"]
    workplace.run()
    assert {pair: text for pair, text in workplace.answers().items() if pair[1] != "greedy"} == {
        pair: text for pair, text in first.items() if pair[0] != "d0"
    }
    workplace.run("generation.seed=8")
    assert all(text != first[pair] for pair, text in workplace.answers().items() if pair in first)


def test_a_sampled_query_asked_twice_is_answered_twice(workplace: Workplace) -> None:
    workplace.queries = [{"id": name, "text": "Who?", "temperature": 1} for name in "ab"]
    workplace.run()
    assert workplace.answers()["d0", "a"] != workplace.answers()["d0", "b"]


def test_a_tiny_top_p_is_greedy(workplace: Workplace) -> None:
    workplace.run()
    greedy = workplace.answers()
    workplace.run("generation.temperature=1", "generation.top_p=0.000001")
    assert workplace.answers() == greedy


# ---- nothing on disk is trusted


def damaged(workplace: Workplace, damage: Callable[[Path], Any]) -> tuple[bytes, Path]:
    """Run, damage the first segment, and forget the result; returns the result's bytes and the segment."""
    workplace.run()
    before = workplace.output.read_bytes()
    workplace.output.unlink()
    segment = workplace.segments()[0]
    damage(segment)
    return before, segment


def _flip_a_bit(segment: Path) -> None:
    content = bytearray((segment / "segment.safetensors").read_bytes())
    content[-5] ^= 16
    (segment / "segment.safetensors").write_bytes(content)


def _truncate(segment: Path) -> None:
    os.truncate(segment / "segment.safetensors", 1000)


def _remove_tensors(segment: Path) -> None:
    (segment / "segment.safetensors").unlink()


def _break_manifest(segment: Path) -> None:
    os.truncate(segment / "segment.json", 100)


def _other_version(segment: Path) -> None:
    manifest = json.loads((segment / "segment.json").read_text())
    (segment / "segment.json").write_text(json.dumps(manifest | {"format_version": 0}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flip_a_bit, "checksum"),
        (_truncate, "1000 bytes of tensors"),
        (_remove_tensors, "the tensors are missing"),
        (_break_manifest, "the manifest cannot be read"),
        (_other_version, "format version 0"),
    ],
)
def test_a_bad_segment_is_set_aside_and_built_again(
    workplace: Workplace, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Any], reason: str
) -> None:
    before, segment = damaged(workplace, damage)
    caplog.clear()
    assert counts(workplace.run()) == (0, 9, 0, 1, 2)
    assert workplace.output.read_bytes() == before
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"{segment.name[:12]} rejected and built again: {reason}" in record.getMessage()
    assert [path.name for path in (workplace.cache / "rejected").iterdir()] == [f"{segment.name}-0"]
    # Healed: the next run restores all three.
    workplace.output.unlink()
    assert counts(workplace.run()) == (0, 9, 0, 0, 3)


def test_a_segment_under_another_key_is_not_used(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    def swap(segment: Path) -> None:
        shutil.rmtree(segment)
        shutil.copytree(workplace.segments()[-1], segment)

    before, _ = damaged(workplace, swap)
    assert counts(workplace.run()) == (0, 9, 0, 1, 2)
    assert workplace.output.read_bytes() == before
    assert "another segment's key" in caplog.text


def test_a_bad_segment_that_cannot_be_set_aside(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    before, _ = damaged(workplace, _flip_a_bit)
    (workplace.cache / "rejected").write_text("in the way")
    assert counts(workplace.run()) == (0, 9, 0, 1, 2)
    assert workplace.output.read_bytes() == before
    assert "cannot be set aside" in caplog.text


def change_weights(model: Path) -> None:
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def change_template(model: Path) -> None:
    file = model / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|end|>", "<|end|>\n"))


def change_config(model: Path) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 2e4}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_weights, "other weights"),
        (change_config, "other weights"),
        (change_template, "another tokenizer or chat template"),
    ],
)
def test_another_model_under_the_same_name_misses(
    workplace: Workplace, caplog: pytest.LogCaptureFixture, change: Callable[[Path], None], reason: str
) -> None:
    model = shutil.copytree(workplace.model, workplace.folder / "model")
    workplace.tree["model"] = str(model)
    workplace.run()
    old = workplace.answers()
    change(model)
    with caplog.at_level(logging.INFO, "pipeline"):
        assert counts(workplace.run()) == (0, 9, 0, 3, 0)
    assert caplog.text.count(f"not in the store: {reason}") == 1  # which is true of all three
    if change is not change_weights:  # one bit may make no difference
        assert workplace.answers() != old
    assert len(workplace.segments()) == 6


@pytest.mark.parametrize("override", ["cache.value_bits=3", "cache.extra_bits=0", "cache.layer_bits={0: 8}"])
def test_another_codec_misses(workplace: Workplace, caplog: pytest.LogCaptureFixture, override: str) -> None:
    workplace.run()
    with caplog.at_level(logging.INFO, "pipeline"):
        assert counts(workplace.run(override)) == (0, 9, 0, 3, 0)
    assert "not in the store: codec was 'turboquant-2 keys=4" in caplog.text
    # The first codec's segments are still there.
    assert counts(workplace.run()) == (0, 9, 0, 0, 3)


def test_an_absent_segment_is_called_absent(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "pipeline"):
        workplace.run()
    assert caplog.text.count("not in the store: absent") == 3
    assert {r.levelno for r in caplog.records if "absent" in r.getMessage()} == {logging.DEBUG}


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), RuntimeError("[write] Unable to write")])
def test_a_store_that_refuses_costs_nothing_but_the_store(
    workplace: Workplace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    workplace.run()
    before = workplace.output.read_bytes()
    workplace.output.unlink()
    shutil.rmtree(workplace.cache)

    def refuse(*_: Any) -> int:
        raise error

    monkeypatch.setattr(pipeline.cache.store, "write_segment", refuse)
    caplog.clear()
    assert counts(workplace.run()) == (0, 9, 0, 3, 0)
    assert workplace.output.read_bytes() == before
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "goes on without storing" in record.getMessage()


def test_a_cache_folder_that_cannot_be_made(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    (workplace.folder / "file").write_text("in the way")
    workplace.tree["cache"] = {"dir": "file/cache"}
    assert counts(workplace.run()) == (0, 9, 0, 3, 0)
    assert caplog.text.count("goes on without storing") == 1


# ---- failures of rows


def test_bad_documents_become_error_rows(workplace: Workplace) -> None:
    workplace.documents |= {"long": "The board met. " * 900, "blank": " \n", "zero": "0 1"}
    workplace.tree["prompt"] = {"context": "{{ 10 / (text | length - 3) }} {{ text }}"}
    report = workplace.run()
    assert counts(report) == (0, 9, 9, 3, 0)
    assert report.failures == {"ContextTooLong": 3, "EmptyDocument": 3, "PromptFailed": 3}
    assert workplace.report()["failures"] == report.failures
    rows = workplace.rows()
    assert len(rows) == 18
    for document, kind, words in (
        ("long", "ContextTooLong", "the model reads 2,048"),
        ("blank", "EmptyDocument", "empty"),
        ("zero", "PromptFailed", "prompt.context: division by zero"),
    ):
        row = rows[document, "when"]
        assert (row["status"], row["error_type"], row["answer"]) == ("error", kind, None)
        assert words in row["error"]
    assert rows["d2", "who"]["status"] == "ok"


def test_a_query_too_long_for_the_model_fails_alone(workplace: Workplace) -> None:
    workplace.queries[1]["max_tokens"] = 2000
    report = workplace.run()
    assert counts(report) == (0, 6, 3, 3, 0)
    assert workplace.rows()["d0", "when"]["error_type"] == "ContextTooLong"


def test_failed_rows_are_tried_again(workplace: Workplace) -> None:
    workplace.documents["d1"] = " "
    assert counts(workplace.run()) == (0, 6, 3, 2, 0)
    assert counts(workplace.run()) == (6, 0, 3, 0, 0)
    workplace.documents["d1"] = "The board met again."
    assert counts(workplace.run()) == (6, 3, 0, 1, 0)
    assert {row["status"] for row in workplace.rows().values()} == {"ok"}


@pytest.mark.parametrize(
    ("where", "error"),
    [("prefill_segment", MemoryError()), ("generate_answers", RuntimeError("[malloc] Unable to allocate"))],
)
def test_a_model_that_fails_on_one_document(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    workplace.run()
    whole = workplace.output.read_bytes()
    workplace.output.unlink()
    shutil.rmtree(workplace.cache)
    module = pipeline.execution.prefixes if where == "prefill_segment" else pipeline.execution.engine
    real, calls = getattr(module, where), []

    def failing(*args: Any) -> Any:
        calls.append(1)
        result = real(*args)
        if len(calls) == 2:
            raise error
        return result

    monkeypatch.setattr(module, where, failing)
    report = workplace.run("retries=0")
    assert report.failures == {"GenerationFailed": 3}
    assert report.rows_answered == 6
    assert workplace.rows()["d1", "who"]["error_type"] == "GenerationFailed"
    assert workplace.rows()["d1", "who"]["context_tokens"] > 100
    # Tried again, and then as if nothing had happened.
    assert workplace.run().rows_answered == 3
    assert workplace.output.read_bytes() == whole


def test_failures_are_counted_once_in_the_progress(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    done = workplace.observer.rows
    monkeypatch.setattr("pipeline.retry.FIRST_WAIT", 0)
    real = pipeline.execution.engine.generate_answers

    def failing(*args: Any) -> Any:
        real(*args)
        raise RuntimeError("after the last answer")

    monkeypatch.setattr(pipeline.execution.engine, "generate_answers", failing)
    assert workplace.run().rows_failed == 9
    assert sum(done) == 9
    monkeypatch.setattr(pipeline.execution.engine, "generate_answers", real)
    workplace.documents["d0"] = ""
    done.clear()
    workplace.run()
    assert sum(done) == 9
    done.clear()
    workplace.run()
    assert sum(done) == 9


def test_layers_that_are_kept_uncompressed_are_logged(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    support = Support((True, False), ("recurrent state (1 ArraysCache)",))
    monkeypatch.setattr("pipeline.execution.engine.explain", lambda model: support)
    workplace.run()
    assert "1 of 2 layers are kept uncompressed: recurrent state (1 ArraysCache)" in caplog.messages


# ---- memory


def test_one_prefix_is_alive_at_a_time(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    real = pipeline.execution.prefixes.prefill_segment

    def watching(*args: Any) -> Any:
        gc.collect()
        assert [ref for ref in alive if ref() is not None] == []
        prefix = real(*args)
        alive.extend([weakref.ref(prefix), *map(weakref.ref, prefix.layers)])
        return prefix

    monkeypatch.setattr("pipeline.execution.prefixes.prefill_segment", watching)
    workplace.documents |= {str(n): f"{n} and {n}" for n in range(4)}
    assert workplace.run().prefixes_built == 7
    gc.collect()
    assert [ref for ref in alive if ref() is not None] == []


# ---- interruption

# Runs a job and dies at the given call of the given function: `before` it, `after` it or `half` through a file.
DIE = """
import importlib, os, signal, sys
from pathlib import Path
job, log, target, when, count = sys.argv[1:]
from turboquant.runtime.blas import load_tuned_blas
load_tuned_blas()  # log-probabilities are rounded alike by one BLAS only
import pipeline.execution.prefixes
from pipeline.job.job_file import load_job
from pipeline.execution.runner import Runner

prefill = pipeline.execution.prefixes.prefill_segment
def logging_prefill(model, tokens, *rest):
    with open(log, "a") as file:
        print(len(tokens), file=file)
    return prefill(model, tokens, *rest)
pipeline.execution.prefixes.prefill_segment = logging_prefill

module, name = target.split(":")
owner = importlib.import_module(module)
*parents, name = name.split(".")
for parent in parents:
    owner = getattr(owner, parent)
real, calls = getattr(owner, name), 0

def dying(*args, **kwargs):
    global calls
    calls += 1
    here = calls == int(count)
    if here and when == "half":
        args[0].write(b"half a file")
    if here and when in ("before", "half"):
        os.kill(os.getpid(), signal.SIGKILL)
    if here and when == "signal":
        os.kill(os.getpid(), signal.SIGINT)
    result = real(*args, **kwargs)
    if here and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, dying)
from pipeline.progress import RunObserver
Runner(load_job(Path(job)), RunObserver()).run()
"""


def run_python(*arguments: str, code: str = DIE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return warm.run(command, env=environment)


@pytest.mark.parametrize(
    ("target", "when", "count"),
    [
        ("pipeline.execution.prefixes:PrefixProvider._chunk_done", "before", 2),  # amid a prefill
        ("mlx.core:save_safetensors", "half", 2),  # amid a segment's tensors
        ("turboquant.io.segment_file:sealed", "before", 2),  # tensors without a manifest
        ("pipeline.execution.engine:Engine._show_row", "after", 4),  # amid a document's answers
        ("pipeline.output.results:Results.commit", "after", 3),  # all parts, no result
        ("shutil:rmtree", "before", 1),  # the result is in place, and the parts are
    ],
)
def test_a_killed_run_is_resumed(workplace: Workplace, tmp_path: Path, target: str, when: str, count: int) -> None:
    killed = Workplace(tmp_path / "killed", workplace.model)
    done = run_python(str(killed.job_file), str(tmp_path / "log"), target, when, str(count))
    assert done.returncode == -signal.SIGKILL, done.stderr
    stored = len(killed.segments())
    begun = (tmp_path / "log").read_text().splitlines()
    assert stored <= len(begun) <= stored + 1
    answered = len(list(Path(f"{killed.output}.parts").glob("*/[!.]*.parquet")))
    report = killed.run()
    # Nothing is prefilled twice but the context in flight, nothing committed is answered twice.
    assert report.prefixes_built == 3 - stored
    assert report.rows_kept == 3 * answered
    assert report.rows_answered == 9 - 3 * answered
    workplace.run()
    assert killed.output.read_bytes() == workplace.output.read_bytes()
    assert not list(killed.folder.rglob(".*"))
    assert len(killed.segments()) == 3
    assert not (killed.cache / "rejected").exists()


def test_an_interrupted_run_finishes_the_rows_in_hand(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    report = workplace.run(observer=Interrupting(row=4))
    assert report.interrupted
    assert workplace.report()["interrupted"]
    assert counts(report) == (0, 6, 0, 2, 0)
    assert not workplace.output.exists()
    assert caplog.text.count("interrupted") == 1
    # Resumed: byte for byte what a run without a break writes.
    assert counts(workplace.run()) == (6, 3, 0, 1, 0)
    resumed = workplace.output.read_bytes()
    workplace.output.unlink()
    workplace.run()
    assert workplace.output.read_bytes() == resumed


def test_an_interrupted_prefill_stops_at_the_next_chunk(workplace: Workplace) -> None:
    workplace.documents["d1"] *= 5
    observer = Interrupting(chunk=2)  # the first chunk of d1, which has four
    report = workplace.run(observer=observer)
    assert report.interrupted
    assert len(observer.chunks) == 2
    assert counts(report) == (0, 3, 0, 1, 0)
    assert report.failures == {}
    assert counts(workplace.run()) == (3, 6, 0, 2, 0)
    resumed = workplace.output.read_bytes()
    workplace.output.unlink()
    workplace.run()
    assert workplace.output.read_bytes() == resumed


def test_a_second_interrupt_stops_at_once(workplace: Workplace) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        workplace.run(observer=Interrupting(row=4, times=2))
    # The lock is free, SIGINT is handled as before, and what was committed is kept.
    assert signal.getsignal(signal.SIGINT) is before
    assert counts(workplace.run()) == (3, 6, 0, 1, 1)


def test_two_runs_on_one_result(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    real = pipeline.execution.engine.generate_answers

    def meanwhile(*args: Any) -> Any:
        with pytest.raises(OutputError) as caught:
            workplace.run()
        messages.append(str(caught.value))
        return real(*args)

    monkeypatch.setattr(pipeline.execution.engine, "generate_answers", meanwhile)
    monkeypatch.setattr("pipeline.output.results.SECONDS_FOR_LOCK", 0)
    assert workplace.run().rows_answered == 9
    expected = f"{workplace.output}: another run is writing this result; wait for it, or set another output.path"
    assert messages == [expected] * 3


def test_a_model_that_cannot_be_loaded_changes_nothing(workplace: Workplace, tmp_path: Path) -> None:
    workplace.run()
    before = workplace.output.read_bytes()
    broken = shutil.copytree(workplace.model, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 5000)
    workplace.tree["model"] = str(broken)
    with pytest.raises(ModelError, match="damaged weights"):
        workplace.run()
    assert workplace.output.read_bytes() == before
