"""How a run is watched: bars, a log for programs, the file of its report, numbers for Prometheus; and completion."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from docs.reference import RUN_FILE
from pipeline import logs
from pipeline.job.job import QueryTable
from pipeline.job.job_file import load_job
from pipeline.metrics import write_metrics
from pipeline.output.provenance import provenance
from pipeline.progress import Progress, RunObserver
from pipeline.report import Report
from tests import warm
from tests.pipeline.command_line import ROOT, in_terminal, invoke
from tests.pipeline.workplace import Workplace

# The command line, with a model that waits behind the first answer of the second document until it may go on.
MAIN = """
import os, sys, time
from turboquant.runtime.blas import load_tuned_blas

load_tuned_blas()
from pipeline.execution import engine
from pipeline.output import run_file as runfile
from pipeline.execution import messages
from pipeline.execution import display as view

runfile.SECONDS_BETWEEN_WRITES = view.SECONDS_BETWEEN_METRICS = messages.SECONDS_BETWEEN_POLLS = 0.01
real = engine.Engine._show_row

calls = []

def waiting(self):
    real(self)
    calls.append(1)
    if len(calls) == 4 and not os.path.exists(sys.argv[2] + ".go"):
        print("waiting", flush=True)
        while not os.path.exists(sys.argv[2] + ".go"):
            time.sleep(0.01)

engine.Engine._show_row = waiting
if __name__ == "__main__":
    from pipeline.cli import main
    main()
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", "run", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return warm.run(command, env=environment)


@pytest.fixture
def numbers() -> Callable[[Path], dict[tuple[str, ...], float]]:
    """Reads the samples of a file of metrics, by name and labels, as Prometheus does."""

    def read(file: Path) -> dict[tuple[str, ...], float]:
        families = list(text_string_to_metric_families(file.read_text()))
        assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
        samples = [sample for family in families for sample in family.samples]
        return {(sample.name.removeprefix("pipeline_"), *sample.labels.values()): sample.value for sample in samples}

    return read


# ---- on a terminal


@pytest.mark.parametrize("options", [[], ["--quiet"], ["--json"], ["--log-format", "json"]])
def test_bars_are_for_people_at_a_terminal(workplace: Workplace, options: list[str]) -> None:
    workplace.run("output.path=" + str(workplace.folder / "other.parquet"))
    workplace.documents["new"] = "The lease of the harbour ends in May. " * 9
    screen = "\n".join(in_terminal(150, "run", workplace.save(), *options))
    if options:
        assert "rows:" not in screen
        return
    last = screen.replace("\r", "\n").split("rows:")[-1].splitlines()[0]
    for words in ("100%", "12/12", "4/4 documents", "answers/s", "75% hits", "prefill ", "0:00 left"):
        assert words in last
    assert "prefill new:" in screen
    assert "\x1b[3" not in screen  # no colour


# ---- the log


def test_every_line_of_a_log_for_programs_is_json(workplace: Workplace) -> None:
    workplace.documents["blank"] = ""
    workplace.save()
    (workplace.cache / "jobs").mkdir(parents=True)
    done = run(workplace.job_file, "--log-format", "json")
    assert done.returncode == 3
    assert "9 answered" in done.stdout
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert [line["message"] for line in lines] == ["run started", *["documents done"] * 4, "run ended"]
    assert lines[0]["rows"] == 12
    assert [line["document_ids"] for line in lines[1:5]] == [["d0"], ["d1"], ["d2"], ["blank"]]
    assert [line["documents_done"] for line in lines[1:5]] == [1, 2, 3, 4]
    assert lines[-1]["failures"] == {"EmptyDocument": 3}


def test_warnings_and_errors_are_json_too(workplace: Workplace) -> None:
    (workplace.folder / "file").write_text("in the way")
    done = run(workplace.job_file, "--log-format", "json", "--quiet", "--set", f"cache.dir={workplace.folder}/file/c")
    (warning,) = map(json.loads, done.stderr.splitlines())
    assert warning["level"] == "warning"
    assert "goes on without storing" in warning["message"]
    done = run(workplace.job_file, "--log-format", "json", "--set", "retries=x")
    (error,) = map(json.loads, done.stderr.splitlines())
    assert (done.returncode, error["level"], error["exit_code"], error["error_type"]) == (2, "error", 2, "JobError")
    assert "retries: expected a whole number" in error["message"]


def test_an_unknown_log_format(workplace: Workplace) -> None:
    result = invoke("run", workplace.job_file, "--log-format", "xml")
    assert result.exit_code == 2
    assert "'json'" in result.stderr


# ---- files


def test_files_are_current_while_a_run_goes_on(workplace: Workplace, numbers: Any) -> None:
    main, metrics = workplace.folder / "main.py", workplace.folder / "metrics" / "run.prom"
    main.write_text(MAIN)
    process = warm.Popen(
        [sys.executable, str(main), "run", str(workplace.job_file), "--metrics", str(metrics)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    end = time.monotonic() + 60
    while workplace.report()["documents_done"] < 1 or numbers(metrics)["documents_done", "job"] < 1:
        assert time.monotonic() < end  # the first document's rows are committed while the second's are answered
    told, read = workplace.report(), numbers(metrics)
    assert (told["state"], told["documents_done"], told["rows_answered"]) == ("running", 1, 3)
    assert told["seconds"] > 0
    assert read["running", "job"] == 1
    assert read["rows", "job"] == 9
    assert 3 <= read["rows_done", "job"] <= 4
    Path(f"{workplace.job_file}.go").touch()
    _, error = process.communicate()
    assert process.returncode == 0, error
    told, read = workplace.report(), numbers(metrics)
    assert (told["state"], told["error"], told["documents_done"]) == ("finished", None, 3)
    assert (read["running", "job"], read["documents_done", "job"], read["rows_done", "job"]) == (0, 3, 9)
    assert read["rows_committed", "job", "answered"] == 9
    assert read["prefixes", "job", "built"] == 3
    assert read["prefilled_tokens_total", "job"] == told["prefilled_tokens"] > 0
    assert list(metrics.parent.iterdir()) == [metrics]


# The same, with a model that waits behind the first tokens of a prefill.
PREFILLING = """
import os, sys, time
from turboquant.runtime.blas import load_tuned_blas

load_tuned_blas()
from pipeline.output import run_file as runfile
from pipeline.execution import prefixes

runfile.SECONDS_BETWEEN_WRITES = 0.01
prefixes.CPU_CHUNK = 16
real = prefixes.PrefixProvider._chunk_done

def waiting(self, tokens):
    real(self, tokens)
    while not os.path.exists(sys.argv[2] + ".go"):
        time.sleep(0.01)

prefixes.PrefixProvider._chunk_done = waiting
if __name__ == "__main__":
    from pipeline.cli import main
    main()
"""


def test_the_run_file_moves_while_a_document_is_prefilled(workplace: Workplace) -> None:
    main = workplace.folder / "main.py"
    main.write_text(PREFILLING)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = warm.Popen([sys.executable, str(main), "run", str(workplace.job_file), "-q"], env=environment)
    end, pace = time.monotonic() + 60, None
    while not (pace and pace["prefilled_tokens"] and pace["seconds"] > 1):
        assert time.monotonic() < end
        pace = Path(f"{workplace.output}.run.json").exists() and workplace.report()["pace"]
    told = workplace.report()
    assert (told["state"], told["prefilled_tokens"], pace["prefilled_tokens"]) == ("running", 0, 16)
    Path(f"{workplace.job_file}.go").touch()
    assert process.wait() == 0
    assert workplace.report()["pace"] is None


def test_the_run_file_and_the_bars_move_while_prefixes_are_restored(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.run()
    workplace.output.unlink()
    monkeypatch.setattr("pipeline.output.run_file.SECONDS_BETWEEN_WRITES", 0.01)
    seen: list[int] = []

    class Watching(RunObserver):
        def restore_advanced(self, tokens: int) -> None:
            seen.append(tokens)
            end = time.monotonic() + 60
            while workplace.report()["pace"]["restored_tokens"] < sum(seen):
                assert time.monotonic() < end

    tokens = workplace.run(observer=Watching()).context_tokens
    assert sum(seen) == tokens
    workplace.output.unlink()
    screen = "\n".join(in_terminal(190, "run", workplace.save()))
    assert f"{tokens:,} tokens restored" in screen


def test_a_name_with_quotes_is_a_label(workplace: Workplace, numbers: Any) -> None:
    workplace.documents["d1"] = ""
    name, metrics = 'a "job"\\\nof two lines', workplace.folder / "run.prom"
    invoke("run", workplace.save(name=name), "--quiet", "--metrics", metrics)
    assert numbers(metrics)["failures", name, "EmptyDocument"] == 3


def test_metrics_are_not_read_before_they_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: Any
) -> None:
    names: list[str] = []
    real = os.replace
    monkeypatch.setattr(
        "os.replace", lambda *paths, **folders: (names.append(os.fspath(paths[0])), real(*paths, **folders))
    )
    progress = Progress(quiet=True)
    progress.run_started(3)
    write_metrics(tmp_path / "run.prom", "job", progress.pace(), Report(), running=True)
    (name,) = names
    assert not name.endswith(".prom")
    assert numbers(tmp_path / "run.prom")["rows", "job"] == 3


def test_metrics_that_cannot_be_written(workplace: Workplace) -> None:
    (workplace.folder / "file").write_text("in the way")
    result = invoke("run", workplace.job_file, "--metrics", workplace.folder / "file" / "run.prom")
    assert result.exit_code == 1
    assert "run.prom: cannot be written: " in result.stderr
    assert not workplace.output.exists()


def test_the_report_of_a_run_that_stopped_says_why(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise LookupError("on\ntwo lines")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.output.results.Results.finish", fail)
        with pytest.raises(LookupError):
            workplace.run()
    told = workplace.report()
    assert (told["state"], told["error"], told["rows_answered"]) == ("failed", "on two lines", 9)
    workplace.documents["d1"] = ""
    invoke("run", workplace.save(), "--fail-fast", "--quiet")
    assert workplace.report()["state"] == "interrupted"


# ---- completion


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["pipeline", "sh"], {"show"}),
        (["pipeline", "run", "job.yaml", "--f"], {"--fail-fast"}),
        (["pipeline", "run", "--log-format", ""], {"text", "json"}),
        (["pipeline", "cache", ""], {"ls", "verify", "gc"}),
        (["pipeline", "run", "jo"], {"job.yaml", "jobs/other.yml"}),
        (["pipeline", "plan", "jobs/"], {"jobs/other.yml"}),
        (["pipeline", "run", "job.yaml", "--set", "cache.k"], {"cache.key_bits=", "cache.keep="}),
        (["pipeline", "run", "job.yaml", "--set", "queries"], {f"queries.{key}=" for key in QueryTable.model_fields}),
    ],
)
def test_a_shell_completes_commands_options_files_and_keys(tmp_path: Path, line: list[str], expected: set[str]) -> None:
    (tmp_path / "jobs").mkdir()
    for name in ("job.yaml", "jobs/other.yml", "job.txt"):
        (tmp_path / name).touch()
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    command = tmp_path / "pipeline"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipeline.cli "$@"\n')
    command.chmod(0o755)
    script = (
        'eval "$(_PIPELINE_COMPLETE=source_bash pipeline)"\n'
        f"COMP_WORDS=({' '.join(word or chr(39) * 2 for word in line)}); COMP_CWORD={len(line) - 1}\n"
        '_pipeline_completion pipeline; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [bash, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert set(done.stdout.split()) == expected


def test_completion_is_installed_by_an_option() -> None:
    assert "--install-completion" in invoke("--help").stdout


def test_a_trace_is_part_of_its_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.LogRecord("pipeline.x", logging.ERROR, __file__, 1, "it failed", (), sys.exc_info())
    line = json.loads(logs._JsonLines().format(record))
    assert (line["level"], line["message"]) == ("error", "it failed")
    assert line["trace"].endswith("ValueError: broken")


def test_the_reference_lists_the_keys_of_run_json(workplace: Workplace) -> None:
    workplace.queries.append({"id": "never", "text": "Why?", "when": "false"})
    workplace.run()
    report = workplace.report()
    assert {*report} == {*RUN_FILE, *provenance(load_job(workplace.job_file), [])}
    counts = ("rows_kept", "rows_answered", "rows_failed", "rows_skipped")
    assert [report[name] for name in (*counts, "rows")] == [0, 9, 0, 3, 12]
