"""The functions of the package as programs and notebooks call them: the same results, files and errors as commands."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.errors import InputError, Interrupted, JobError, OutputError
from pipeline.progress import Pace
from tests import ROOT, warm
from tests.pipeline.workplace import Workplace

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.MULTILINE | re.DOTALL)


def children() -> list[str]:
    """The processes that runs started. They are forked from a warm one, which was started before them."""
    listed = ["ps", "-o", "pid=,args=", "--sort=start_time", "--ppid", str(os.getpid())]
    told = subprocess.run(listed, capture_output=True, text=True).stdout.splitlines()
    return [line for line in told if "tests.warm" in line][1:] + [line for line in told if "spawn_main" in line]


def bytes_of_many_documents(workplace: Workplace) -> bytes:
    """Run a job of twelve documents, so that there is time to interrupt the next run of it."""
    workplace.documents |= {
        f"e{number}": f"{number}. {text}" for number in range(9) for text in ["The board met. " * 40]
    }
    workplace.run()
    return workplace.output.read_bytes()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import pipeline, sys; print(*({'numpy', 'pyarrow', 'pydantic', 'mlx', 'typer', 'tqdm'} & {*sys.modules}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout.strip() == ""


def test_a_run_gives_the_bytes_of_the_command_line(workplace: Workplace) -> None:
    workplace.run()
    expected = workplace.output.read_bytes()
    result = pipeline.run(workplace.save(output={"path": "out/b.parquet"}), quiet=True)
    assert Path(result.path).read_bytes() == expected
    assert result.table.equals(pq.read_table(workplace.output))
    assert result.report is not None
    assert result.report.rows_answered == 9
    assert result.failures == []
    assert result.wide().num_rows == 3
    assert not children()


def frames() -> Iterator[tuple[str, Callable[[dict[str, list[str]]], Any]]]:
    yield "arrow", pa.table
    yield "dicts", lambda columns: (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    yield "pandas", lambda columns: pytest.importorskip("pandas").DataFrame(columns)
    yield "polars", lambda columns: pytest.importorskip("polars").DataFrame(columns)


@pytest.mark.parametrize(("make"), [pytest.param(make, id=name) for name, make in frames()])
def test_documents_in_memory_are_written_beside_the_result_with_a_job_that_the_command_line_runs(
    workplace: Workplace, make: Callable[[dict[str, list[str]]], Any]
) -> None:
    workplace.save()
    columns = {"id": ["a", "b"], "text": ["The board met.", "The lease ends."]}
    plan = pipeline.plan(workplace.job_file, make(columns))
    assert plan.status.documents == 2
    (written,) = workplace.output.parent.glob("a.parquet.documents.*")
    content = written.read_bytes()
    again = pipeline.plan(f"{workplace.output}.job.yaml")
    assert again.tokens == plan.tokens
    pipeline.plan(workplace.job_file, make(columns))
    assert written.read_bytes() == content


def test_the_answers_on_documents_in_memory_are_found_without_them(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace.folder)
    workplace.save()
    job = workplace.tree | {"documents": {"limit": 1}, "queries": ["Who met?"]}
    with pytest.raises(JobError, match=r"documents\.path"):
        pipeline.result(job)
    documents = [{"id": "a", "text": "The board met."}]
    expected = pipeline.run(job, documents, quiet=True).table
    written = Path(f"{workplace.output}.job.yaml").read_bytes()
    assert pipeline.result(job).table.equals(expected)
    assert Path(f"{workplace.output}.job.yaml").read_bytes() == written
    Path("without.yaml").write_text(json.dumps(job), encoding="utf-8")
    assert pipeline.result("without.yaml").table.equals(expected)


def test_a_mapping_and_a_job_are_the_job_of_a_file(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.queries[0] |= {"choices": ["yes", "no"], "evidence": 2}
    workplace.save(cache={"dir": "cache", "layer_bits": {0: 8}}, prompt={"system": None})
    monkeypatch.chdir(workplace.folder)
    job = pipeline.load_job("job.yaml", overrides={"generation.max_tokens": 7, "cache.key_bits": 3})
    assert (job.generation.max_tokens, job.cache.key_bits) == (7, 3)
    pipeline.plan(job)
    assert pipeline.load_job(f"{workplace.output}.job.yaml") == job
    pipeline.plan(workplace.tree | {"queries": workplace.queries, "name": "job"})
    assert pipeline.load_job(f"{workplace.output}.job.yaml") == pipeline.load_job("job.yaml")


def test_an_interrupted_run_leaves_its_answers_and_is_resumed_by_the_command_it_names(workplace: Workplace) -> None:
    expected = bytes_of_many_documents(workplace)
    workplace.save(output={"path": "out/b.parquet"})
    stop, running = threading.Event(), []

    def watch(pace: Pace) -> None:
        running.append(children())
        if pace.rows_done:
            stop.set()

    documents = pq.read_table(workplace.folder / "docs.parquet")
    with pytest.raises(Interrupted, match="the same call resumes the run, or: cd "):
        pipeline.run(workplace.job_file, documents, on_progress=watch, stop=stop)
    assert any(running)
    assert not children()
    output = workplace.folder / "out/b.parquet"
    assert not output.exists()
    assert 0 < pipeline.result(f"{output}.job.yaml").table.num_rows < 36
    command = json.loads(Path(f"{output}.run.json").read_text())["command"]
    command = command.replace("&& pipeline run", f"&& {sys.executable} -m pipeline.cli run")
    assert subprocess.run(["sh", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0
    assert output.read_bytes() == expected


def test_an_exception_of_the_caller_ends_the_run_and_is_noted_in_the_run_file(workplace: Workplace) -> None:
    def fail(pace: Pace) -> None:
        if pace.rows_done:
            raise ZeroDivisionError("of the caller")

    workplace.documents = {f"d{number}": "The board met on the third of May. " * 9 for number in range(12)}
    with pytest.raises(ZeroDivisionError, match="of the caller"):
        pipeline.run(workplace.save(), on_progress=fail)
    assert not children()
    assert [workplace.report()[name] for name in ("state", "error")] == ["failed", "of the caller"]
    assert pipeline.run(workplace.job_file, quiet=True).table.num_rows == 36


def test_errors_are_exceptions_of_the_package(workplace: Workplace) -> None:
    workplace.save()
    with pytest.raises(JobError, match="did you mean 'key_bits'"):
        pipeline.run(workplace.job_file, overrides={"cache.key_bit": 3})
    with pytest.raises(JobError, match="no such job file"):
        pipeline.plan("nothing.yaml")
    with pytest.raises(JobError, match=r"^job: the required key 'model' is missing"):
        pipeline.plan({"queries": ["Who?"]})
    with pytest.raises(OutputError, match=r"no answers yet; pipeline\.run makes them"):
        _ = pipeline.result(workplace.job_file).table
    with pytest.raises(InputError, match="expected a path, a data frame"):
        pipeline.plan(workplace.job_file, 3)
    with pytest.raises(InputError, match=r"number 1 \(from 0\) is no mapping"):
        pipeline.plan(workplace.job_file, [{"id": "a", "text": "b"}, "c"])


def test_a_script_without_a_guard_runs_once(workplace: Workplace) -> None:
    script = workplace.folder / "script.py"
    script.write_text(
        f"import pipeline\nprint('once')\nprint(pipeline.run({str(workplace.save())!r}).table.num_rows)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    told = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert told.stdout.split() == ["once", "9"], told.stderr


def test_two_runs_in_threads_under_asyncio(workplace: Workplace) -> None:
    workplace.save()

    async def both() -> list[pipeline.Result]:
        runs = [
            asyncio.to_thread(pipeline.run, workplace.job_file, overrides={"output.path": path}, quiet=True)
            for path in (str(workplace.folder / "out/b.parquet"), str(workplace.folder / "out/c.parquet"))
        ]
        return await asyncio.gather(*runs)

    first, second = asyncio.run(both())
    assert Path(first.path).read_bytes() == Path(second.path).read_bytes()


def test_the_examples_of_the_page_work(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.save()
    monkeypatch.chdir(workplace.folder)
    names: dict[str, Any] = {"MODEL": str(workplace.model)}
    for block in BLOCKS:
        exec(block, names)
    assert names["plan"].status.rows == 2
    assert names["result"].table.num_rows == 9
    assert pq.read_table("out/frame.parquet").num_rows == 6


# ---- notebooks


def notebook(*cells: str) -> Any:
    nbformat = pytest.importorskip("nbformat")
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])


def execute(workplace: Workplace, *cells: str) -> list[str]:
    """Execute a notebook in the workplace's folder; return what each cell printed on its last line."""
    nbclient = pytest.importorskip("nbclient")
    made = notebook(f"import sys; sys.path.insert(0, {str(ROOT)!r})", *cells)
    nbclient.NotebookClient(made, timeout=300, resources={"metadata": {"path": str(workplace.folder)}}).execute()
    printed = []
    for cell in made.cells[1:]:
        texts = [output["text"] for output in cell.outputs if output.get("name") == "stdout"]
        printed.append("".join(texts).strip())
    return printed


@pytest.mark.filterwarnings("ignore")
def test_a_notebook_is_interrupted_shows_what_is_there_and_resumes(workplace: Workplace) -> None:
    expected = bytes_of_many_documents(workplace)
    workplace.save(output={"path": "out/b.parquet"})
    printed = execute(
        workplace,
        "import pipeline, signal, subprocess, os\nfrom pipeline.errors import Interrupted\n"
        "asked = []\ndef interrupt(pace):\n"
        "    if pace.rows_done and not asked: asked.append(signal.raise_signal(signal.SIGINT))",
        "try:\n    pipeline.run('job.yaml', on_progress=interrupt)\nexcept Interrupted:\n    print('interrupted')",
        "print(0 < pipeline.result('job.yaml').table.num_rows < 36)",
        "print(subprocess.run(['pgrep', '-f', 'spawn_main', '-P', str(os.getpid())], capture_output=True).stdout)",
        "print(pipeline.run('job.yaml').to_pandas().shape[0])",
    )
    assert printed[1:] == ["interrupted", "True", "b''", "36"]
    assert (workplace.folder / "out/b.parquet").read_bytes() == expected


@pytest.mark.filterwarnings("ignore")
def test_a_killed_notebook_is_resumed_by_the_command_line(workplace: Workplace) -> None:
    exceptions = pytest.importorskip("nbclient.exceptions")
    expected = bytes_of_many_documents(workplace)
    workplace.save(output={"path": "out/b.parquet"})
    with pytest.raises((exceptions.DeadKernelError, exceptions.CellTimeoutError)):
        execute(
            workplace,
            "import pipeline, os, signal, pyarrow.parquet as pq\n"
            "def die(pace):\n    if pace.rows_done >= 3: os.kill(os.getpid(), signal.SIGKILL)",
            "pipeline.run('job.yaml', pq.read_table('docs.parquet'), on_progress=die)",
        )
    output = workplace.folder / "out/b.parquet"
    assert not output.exists()
    command = [sys.executable, "-m", "pipeline.cli", "run", f"{output}.job.yaml"]
    assert warm.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0
    assert output.read_bytes() == expected
