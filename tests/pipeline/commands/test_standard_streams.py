"""What becomes of stdin, stdout and stderr does not change how a run ends; nor does a low limit of open files."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys

import pytest

from tests import ROOT
from tests.pipeline.workplace import Workplace

_PR_CAPBSET_DROP, _CAP_SYS_RESOURCE = 24, 24  # linux/prctl.h, linux/capability.h
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's devices and capabilities")


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which $RUN is `pipeline run`; its exit code is that of $RUN."""
    return subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RUN": f"{sys.executable} -m pipeline.cli run"},
    )


@linux
@pytest.mark.parametrize(
    ("streams", "options", "code"),
    [
        ("2>&-", "", 0),
        ("<&- >&- 2>&-", "", 3),
        ("> /dev/full 2> /dev/full", "", 0),
        ("> /dev/full 2> /dev/full", "--json", 3),
        ("2>&1 | true", "--json", 0),
    ],
)
def test_streams_that_cannot_be_written_do_not_change_the_exit_code(
    workplace: Workplace, streams: str, options: str, code: int
) -> None:
    workplace.documents["d1"] = "" if code else workplace.documents["d1"]
    done = shell(f"$RUN {workplace.save()} {options} {streams}")
    assert done.returncode == code, done.stderr
    assert len(workplace.rows()) == 9
    assert workplace.rows()["d1", "what"]["error_type"] == ("EmptyDocument" if code else None)


@linux
def test_an_error_keeps_its_exit_code_without_stderr(workplace: Workplace) -> None:
    (workplace.folder / "docs.parquet").unlink()
    done = shell(f"$RUN {workplace.job_file} 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


@linux
def test_a_low_hard_limit_of_open_files_is_enough(workplace: Workplace) -> None:
    """mlx-lm asks for 4,096 when it is imported, which an ordinary user may not."""

    def limit_files() -> None:
        ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_SYS_RESOURCE)  # or root might raise it
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 2048))

    raised = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 4096))"
    refused = subprocess.run([sys.executable, "-c", raised], check=False, capture_output=True, preexec_fn=limit_files)
    assert refused.returncode == 1, "this process may raise its hard limit, so nothing is tested"
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "run", str(workplace.job_file)],
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=limit_files,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_importing_mlx_lm_lowers_no_limit() -> None:
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (2500, 3000))\n"
        "import turboquant.mlx_lm.imported\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (2500, 3000)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
