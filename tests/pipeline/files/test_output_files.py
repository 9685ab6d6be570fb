"""Outputs that a user names and that are no plain files: links stay links, devices and pipes stay what they are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import pytest

from tests import ROOT
from tests.pipeline.command_line import error_of, in_terminal, invoke
from tests.pipeline.workplace import Workplace


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("is_there", [True, False])
def test_a_result_that_is_a_link_stays_one(workplace: Workplace, elsewhere: Path, is_there: bool) -> None:
    workplace.run()
    expected = workplace.output.read_bytes()
    target = elsewhere / "answers.parquet"
    if is_there:
        workplace.output.rename(target)
    else:
        workplace.output.unlink()
    workplace.output.symlink_to(target)
    workplace.queries[0]["text"] = "Who met?"
    assert invoke("run", workplace.save(), "--quiet").exit_code == 0
    assert workplace.output.is_symlink()
    assert not target.is_symlink()
    assert pq.read_metadata(target).num_rows == 9
    assert target.read_bytes() != expected
    assert os.listdir(elsewhere) == ["answers.parquet"]


@pytest.mark.usefixtures("here")
def test_a_page_goes_to_devices_pipes_and_through_links(workplace: Workplace, elsewhere: Path) -> None:
    workplace.run()
    link, target, pipe = workplace.folder / "link.html", elsewhere / "page.html", elsewhere / "pipe"
    link.symlink_to(target)
    for _ in range(2):
        assert invoke("show", workplace.job_file, "--html", link).exit_code == 0
        assert link.is_symlink()
        assert target.read_text().startswith("<!doctype html>")
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    assert invoke("show", workplace.job_file, "--html", pipe).exit_code == 0
    reader.join()
    assert read == [target.read_text()]
    null = elsewhere / "null"
    null.symlink_to("/dev/null")
    assert invoke("show", workplace.job_file, "--html", null).exit_code == 0
    assert null.is_char_device()
    assert sorted(os.listdir(elsewhere)) == ["null", "page.html", "pipe"]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="Linux has a file system in memory there")
def test_a_file_system_below_dev_has_files(workplace: Workplace) -> None:
    """What was there before is replaced. A run once appended to it, as to a device."""
    with TemporaryDirectory(dir="/dev/shm") as folder:
        workplace.save(output={"path": f"{folder}/a.parquet"})
        workplace.output = Path(folder) / "a.parquet"
        workplace.run()
        workplace.queries[0]["text"] = "Who met?"
        workplace.run()
        assert len(workplace.rows()) == 9
        assert workplace.output.read_bytes().count(b"PAR1") == 2


def test_a_shell_s_output_is_appended_to(tmp_path: Path) -> None:
    code = "from pathlib import Path; from pipeline.files.atomic import output_file\n"
    code += "with output_file(Path('/dev/stdout')) as file: file.write_text('x')"
    with (tmp_path / "shown").open("w") as shown:
        for _ in range(2):
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=shown)
    assert (tmp_path / "shown").read_text() == "xx"


def test_metrics_go_to_a_terminal(workplace: Workplace) -> None:
    shown = in_terminal(80, "run", workplace.job_file, "--quiet", "--metrics", "/dev/stdout")
    assert any(line.startswith("pipeline_rows{") for line in shown)


def test_a_loop_of_links_is_replaced(workplace: Workplace) -> None:
    workplace.run()
    loop = workplace.folder / "loop.html"
    loop.symlink_to(loop)
    assert invoke("show", workplace.job_file, "--html", loop).exit_code == 0
    assert loop.read_text().startswith("<!doctype html>")


@pytest.mark.usefixtures("here")
def test_a_result_must_be_a_file(workplace: Workplace, elsewhere: Path) -> None:
    os.mkfifo(elsewhere / "pipe.parquet")
    for path in ("/dev/null", str(elsewhere / "pipe.parquet")):
        error = error_of(invoke("run", workplace.job_file, "--set", f"output.path={path}"))
        assert "is a device or a pipe; output.path must name a file" in error
    assert (elsewhere / "pipe.parquet").is_fifo()
