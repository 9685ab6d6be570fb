"""Every process of a command loads the tuned BLAS before it imports MLX, and before NumPy if it imports MLX later."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.import_recorder import imports_of
from tests.pipeline.command_line import invoke
from tests.pipeline.workplace import Workplace

# What a process notes when it ends.
NOTE_MODULES = """
import atexit, sys

def note():
    with open("modules.txt", "a") as file:
        print(*sorted({"pandas", "pyarrow"} & set(sys.modules)), file=file)

atexit.register(note)
"""
IN_ORDER = {"numpy": "after", "mlx.core": "after"}


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    folder = tmp_path / "recorder"
    folder.mkdir()
    return folder


def test_run_computes_in_the_model_s_process_alone_and_imports_no_pandas(workplace: Workplace, recorder: Path) -> None:
    """pyarrow imports pandas, where it is installed, unless it is kept out."""
    command = ["-m", "pipeline.cli", "run", workplace.save()]
    assert imports_of(recorder, command, also=NOTE_MODULES) == [IN_ORDER]
    assert (recorder / "modules.txt").read_text().split() == ["pyarrow"]


def test_bench_computes_in_one_process_for_each_baseline(workplace: Workplace, recorder: Path) -> None:
    options = ["--documents", "1", "--queries", "1", "--contender", "naive", "--contender", "copied"]
    command = ["-m", "pipeline.cli", "bench", workplace.save(), *options]
    assert imports_of(recorder, command) == [IN_ORDER, IN_ORDER]


@pytest.mark.parametrize(
    "command", [["plan"], ["status"], ["merge"], ["show"], ["cache", "ls"], ["doctor"]], ids=" ".join
)
def test_other_commands_compute_where_they_run(command: list[str], workplace: Workplace, recorder: Path) -> None:
    job = workplace.save()
    if command == ["merge"]:
        for shard in ("1/2", "2/2"):
            assert invoke("run", job, "--shard", shard).exit_code == 0
    elif command == ["show"]:
        workplace.run()
    arguments = [] if command == ["doctor"] else [job]
    for modules in imports_of(recorder, ["-m", "pipeline.cli", *command, *arguments]):
        assert set(modules.values()) == {"after"}


@pytest.mark.parametrize("module", ["pipeline.cli", "pipeline.execution.lease_worker", "pipeline.execution.worker"])
def test_modules_that_a_process_imports_at_its_start_import_no_mlx(module: str, recorder: Path) -> None:
    assert imports_of(recorder, ["-c", f"import {module}"]) == []
