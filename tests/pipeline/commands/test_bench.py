"""``pipeline bench``: every contender does the same work in its own process, which may die, and leaves no files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from pipeline.commands import bench
from pipeline.commands.bench_result import CONTENDERS, BenchRow
from pipeline.job.job_file import load_job
from tests import ROOT, warm
from tests.pipeline import command_line
from tests.pipeline.workplace import Workplace

PIPELINE = {
    ("pipeline-cold", "packed"),
    ("pipeline-cold", "dense"),
    ("pipeline-warm", "packed"),
    ("pipeline-warm", "dense"),
}
STOCK = {("naive", None), ("reloaded", None), ("copied", None), ("quantized", None)}

# The command line, where the process of reloaded is killed or hangs when it saves its first prompt cache. This is the
# main script, so the spawned processes import it too.
MAIN = """
import os, signal

if __name__ == "__mp_main__":
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    from pipeline.commands import baselines

    save = baselines.save_prompt_cache

    def fated(file, *rest):
        if "reloaded" in file and os.environ["FATE"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if "reloaded" in file and os.environ["FATE"] == "hang":
            print("hanging", flush=True)
            signal.pause()
        save(file, *rest)

    baselines.save_prompt_cache = fated

if __name__ == "__main__":
    from pipeline.cli import main
    main()
"""


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the files in subfolders, which are neither jobs, documents nor scripts."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent != folder}


def start(workplace: Workplace, *options: str, fate: str = "") -> subprocess.Popen[str]:
    main = workplace.folder / "main.py"
    main.write_text(MAIN)
    return warm.Popen(
        [sys.executable, str(main), "bench", str(workplace.save()), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "FATE": fate},
        start_new_session=True,
    )


# ---- all contenders


@dataclass(frozen=True)
class Ran:
    """A bench of all contenders: two documents behind a blank one, two queries that fit and one that does not."""

    out: str
    error: str
    exit_code: int
    before: dict[Path, bytes]
    after: dict[Path, bytes]
    left_over: list[Path]

    @property
    def rows(self) -> dict[tuple[str, str | None], dict[str, Any]]:
        return {(row["contender"], row["resident"]): row for row in json.loads(self.out)}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Ran:
    # Attention counts for more in the model of the other tests, and 8 bits do not give exactly its answers.
    workplace = Workplace(tmp_path_factory.mktemp("bench"), write_model(tmp_path_factory.mktemp("model")))
    workplace.documents = {"blank": " ", **workplace.documents}
    workplace.queries.insert(2, {"id": "long", "text": "And what else?", "max_tokens": 2048})
    workplace.tree["cache"] |= {"key_bits": 8, "value_bits": 8, "keep": "job"}
    for file in (workplace.cache / "ab" / "mine", workplace.output):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"not to be touched")
    before = contents(workplace.folder)
    process = start(workplace, "--json", "--documents", "2", "--queries", "3", "--naive-queries", "1")
    out, error = process.communicate()
    left_over = list(workplace.folder.glob(".bench-*"))
    return Ran(out, error, process.returncode, before, contents(workplace.folder), left_over)


def test_every_contender_is_measured(ran: Ran) -> None:
    assert ran.exit_code == 0, ran.error
    assert set(ran.rows) == STOCK | PIPELINE
    for key, row in ran.rows.items():
        assert list(row) == [field.name for field in fields(BenchRow)], key
        assert row["failed"] is None, key
        assert row["applies"] is True, key
        assert row["answers"] == (2 if row["contender"] == "naive" else 4), key
        assert row["answers_per_second"] == pytest.approx(row["answers"] / row["seconds"]), key
        assert row["tokens_per_second"] == pytest.approx(row["answer_tokens"] / row["seconds"]), key
        assert 0 < row["answer_tokens"] <= row["answers"] * 5, key
        assert 0 <= row["extra_bytes"] < row["peak_bytes"], key


def test_all_give_the_same_answers_with_eight_bits(ran: Ran) -> None:
    rows = [row for row in ran.rows.values() if row["contender"] != "quantized"]  # which may well lose some
    assert {row["agreement"] for row in rows} == {1.0}
    assert len({row["answer_tokens"] for row in rows if row["contender"] != "naive"}) == 1
    assert 0 <= ran.rows["quantized", None]["agreement"] <= 1


def test_warm_prefills_nothing_and_what_keeps_caches_says_how_big_they_are(ran: Ran) -> None:
    for (contender, _), row in ran.rows.items():
        assert (row["prefill_seconds"] == 0) == (contender == "pipeline-warm")
        assert (row["disk_bytes"] == 0) == (contender in ("naive", "copied"))


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of processes is read in /proc")
def test_a_pipeline_in_two_processes_is_measured_as_a_whole(workplace: Workplace) -> None:
    rows = {}
    for processes in (1, 2):
        options = ["--json", "--contender", "pipeline-cold", "--set", "cache.resident=packed"]
        done = start(workplace, *options, "--set", f"scale.processes={processes}")
        out, error = done.communicate()
        assert done.returncode == 0, error
        (rows[processes],) = json.loads(out)
    one, two = rows[1], rows[2]
    assert (two["answers"], two["answer_tokens"]) == (one["answers"], one["answer_tokens"])
    assert two["seconds"] > two["prefill_seconds"] > 0
    assert two["peak_bytes"] > 1.2 * one["peak_bytes"]  # both processes have the packages and a model
    assert 0 <= two["extra_bytes"] < two["peak_bytes"]


def test_pairs_that_cannot_be_answered_are_left_out_and_counted(ran: Ran) -> None:
    assert "document 'blank' is left out: the document's text is empty" in ran.error
    assert "copied: 4 answered in " in ran.error
    assert ran.error.count("; 2 left out, too long") == len(STOCK | PIPELINE) - 1  # naive is not asked that query


def test_no_files_are_left_or_changed(ran: Ran) -> None:
    assert ran.after == ran.before
    assert not ran.left_over


# ---- contenders that fail


def test_a_contender_that_dies_is_a_failed_row_and_the_others_go_on(
    workplace: Workplace, write_model: Callable[..., Path]
) -> None:
    workplace.tree["model"] = str(write_model(workplace.folder / "two-layers"))  # as in `ran`
    workplace.tree["cache"] |= {"key_bits": 8, "value_bits": 8}
    workplace.tree["generation"] |= {"temperature": 0.7}
    names = [part for name in ("pipeline-warm", "copied", "reloaded", "naive") for part in ("--contender", name)]
    process = start(workplace, "--json", "--documents", "1", *names, fate="kill")
    out, error = process.communicate()
    assert process.returncode == 1, error
    rows = {row["contender"]: row for row in json.loads(out)}
    assert list(rows) == ["naive", "reloaded", "copied", "pipeline-warm"]  # whose store a cold run filled, unlisted
    assert rows["reloaded"]["failed"] == "its process was killed by signal 9 (SIGKILL), probably out of memory"
    assert rows["reloaded"]["applies"] is True
    assert rows["reloaded"]["seconds"] is None
    assert "one sampler for all rows" in rows["copied"]["failed"]
    assert rows["copied"]["applies"] is False
    assert rows["pipeline-warm"]["agreement"] == 1.0  # what is sampled depends on the row's seed alone
    assert not list(workplace.folder.glob(".bench-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_leaves_no_files(workplace: Workplace, number: signal.Signals) -> None:
    process = start(workplace, "--contender", "reloaded", fate="hang")
    assert process.stdout is not None
    assert process.stdout.readline() == "hanging\n"
    assert list(workplace.folder.glob(".bench-*"))
    os.killpg(process.pid, number)  # as a terminal does, to both processes
    out, error = process.communicate()
    assert process.returncode == 130
    assert out == ""
    assert error.splitlines() == ["reloaded: started", "interrupted; nothing was kept"]
    assert not list(workplace.folder.glob(".bench-*"))
    assert not workplace.cache.exists()


# ---- the command line


def invoke(*arguments: str | Path) -> Result:
    return command_line.invoke("bench", *arguments)


def test_an_unknown_contender_is_an_error(workplace: Workplace) -> None:
    result = invoke(workplace.job_file, "--contender", "vllm")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "--contender vllm: there is no such contender" in result.stderr
    assert all(name in result.stderr for name in CONTENDERS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"documents": {"path": "nix.parquet"}}, "nix.parquet does not exist"),
        ({"prompt": {"context": "{{ text.nix }}"}}, "no document that is fit for the prompt"),
    ],
)
def test_a_wrong_job_is_an_error_before_anything_is_run(workplace: Workplace, change: Any, words: str) -> None:
    result = invoke(workplace.save(**change))
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert not list(workplace.folder.glob(".bench-*"))


def test_a_model_that_cannot_be_loaded_ends_it(workplace: Workplace, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = invoke(workplace.job_file, "--set", f"model={tmp_path / 'empty'}")
    assert result.exit_code == 2, result.output
    assert "no config.json" in result.stderr
    assert not list(workplace.folder.glob(".bench-*"))


@pytest.mark.parametrize(("applies", "exit_code"), [(True, 1), (False, 0)])
def test_the_table(workplace: Workplace, monkeypatch: pytest.MonkeyPatch, applies: bool, exit_code: int) -> None:
    def measured(*_: Any) -> Sequence[BenchRow]:
        return [
            BenchRow("naive", None, seconds=40.0, answers=10, answers_per_second=0.25),
            BenchRow("copied", None, failed="its process died", applies=applies),
            BenchRow(
                "pipeline-warm", "dense", seconds=2.0, answers_per_second=5.0, disk_bytes=6_100_000, agreement=0.5
            ),
        ]

    monkeypatch.setattr(bench, "bench", measured)
    result = invoke(workplace.job_file)
    assert result.exit_code == exit_code
    heads, *lines, failed = result.stdout.splitlines()
    (at_naive, at_copied) = heads.index("x naive"), heads.index("x copied")
    assert [line[at_naive:].split()[0] for line in lines] == ["1.0", "-", "20.0"]
    assert [line[at_copied:].split()[0] for line in lines] == ["-", "-", "-"]
    assert "6.1 MB" in lines[2]
    assert lines[2].endswith("50%")
    assert failed == "copied: its process died"


def noting(make: Callable[..., Any], done: list[str]) -> Callable[..., Any]:
    """Return ``make`` with a record of the documents of its jobs."""

    def noted(job: Any, *rest: Any, **options: Any) -> Any:
        done.append(Path(job.documents.path).name)
        return make(job, *rest, **options)

    return noted


@pytest.mark.parametrize("contender", ["copied", "pipeline-cold"])
def test_a_gpu_is_warmed_up_before_it_is_measured(
    contender: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small job does not change the measured result."""
    from pipeline.commands import baselines
    from pipeline.job.job_file import load_job

    job, folder = load_job(workplace.save(), []), workplace.folder / "bench"
    folder.mkdir()
    part = bench.job_part(job, bench.Extent(1), folder / "documents.parquet")
    small = bench.warm_up_job(part, folder)
    own = bench.contender_job(part, contender, None if contender == "copied" else "packed", bench.Extent(1), folder)
    expected = baselines.run_contender(contender, own, small, folder)
    monkeypatch.setattr(baselines, "on_cpu", lambda: False)
    if contender != "copied":
        own.result_file.unlink()
        shutil.rmtree(own.cache.dir)
    done: list[str] = []
    for name in ("Runner", "_StockModel"):
        monkeypatch.setattr(baselines, name, noting(getattr(baselines, name), done))
    outcome = baselines.run_contender(contender, own, small, folder)
    assert done == ["small.parquet", "documents.parquet"]
    assert outcome.answers == expected.answers
    assert outcome.disk_bytes == expected.disk_bytes
    assert outcome.answer_tokens == expected.answer_tokens
    assert not (folder / "small").exists()


def test_questions_with_answers_in_them_are_beyond_mlx_lm(workplace: Workplace) -> None:
    workplace.queries.append({"id": "then", "text": f"And after {{{{ answers.{workplace.queries[0]['id']} }}}}?"})
    process = start(workplace, "--json", "--contender", "naive", "--contender", "reloaded")
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    for row in json.loads(out):
        assert "columns or answers" in row["failed"]
        assert row["applies"] is False


def test_what_mlx_lm_cannot_split_is_too_long_for_all(workplace: Workplace, tmp_path: Path) -> None:
    workplace.save(documents={"path": "docs.parquet", "too_long": "split"})
    part = bench.job_part(load_job(workplace.job_file), bench.Extent(1), tmp_path / "documents.parquet")
    assert part.documents.too_long == "error"
