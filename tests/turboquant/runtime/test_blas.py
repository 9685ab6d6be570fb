"""The BLAS under MLX: which one is used, and that its results are right. Each case runs in a process of its own."""

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

from tests import ROOT
from tests.import_recorder import imports_of


def is_installed(distribution):
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


linux_cpu = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not is_installed("mlx-cpu"),
    reason="the tuned BLAS is for MLX's CPU wheel on Linux x86-64",
)
SWITCHES = ("TURBOQUANT_BLAS", "PIPELINE_BLAS")
DEMO = ROOT / "jobs" / "demo" / "model"
VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", *SWITCHES, "LD_PRELOAD")

LOAD = """
import json, os, sys
from dataclasses import asdict
from turboquant.runtime.blas import load_tuned_blas
blas = load_tuned_blas()
"""
REPORT = """
import mlx.core as mx
mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
print(json.dumps({**asdict(blas), "mapped": open("/proc/self/maps").read()}))
"""
# Every way MLX reaches BLAS: shapes around vector widths and block sizes, transposes, matrix times vector,
# views with strides, batches with broadcasting, fused addition, both real types and the complex one.
COMPARE = """
import itertools
import mlx.core as mx
import numpy as np

random = np.random.default_rng(0)
worst = 0.0


def compare(got, expected):
    global worst
    mx.eval(got)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    scale = np.abs(expected).max() + 1e-9 if expected.size else 1.0
    worst = max(worst, float(np.abs(np.array(got) - expected).max() / scale) if expected.size else 0.0)


def draw(*shape):
    return random.standard_normal(shape).astype(np.float32)


with mx.stream(mx.cpu):
    for m, n, k in itertools.product((1, 2, 7, 16, 65, 130), repeat=3):
        a, b, c = draw(m, k), draw(k, n), draw(m, n)
        x, y, z = mx.array(a), mx.array(b), mx.array(c)
        compare(x @ y, a @ b)
        compare(mx.array(np.ascontiguousarray(a.T)).T @ mx.array(np.ascontiguousarray(b.T)).T, a @ b)
        compare(mx.addmm(z, x, y, alpha=0.5, beta=2.0), 2 * c + 0.5 * (a @ b))
    for k in (1, 5, 300):
        a, v = draw(33, k), draw(k)
        compare(mx.array(a) @ mx.array(v), a @ v)
        compare(mx.array(v) @ mx.array(a).T, v @ a.T)
    a, b = draw(40, 60), draw(60, 50)
    compare(mx.array(a)[::2, 3:30] @ mx.array(b)[3:30, ::3], a[::2, 3:30] @ b[3:30, ::3])
    compare(mx.array(a)[5:9].T @ mx.array(b)[1:5], a[5:9].T @ b[1:5])
    a, b = draw(3, 4, 17, 9), draw(4, 9, 21)
    compare(mx.array(a) @ mx.array(b), a @ b)
    left, right = (0, 2, 1, 3), (0, 2, 3, 1)
    x = mx.array(a)
    compare(x.transpose(left) @ x.transpose(right), a.transpose(left) @ a.transpose(right))
    for m in (1, 4):
        compare(mx.zeros((m, 0)) @ mx.zeros((0, 5)), np.zeros((m, 5), np.float32))
    a, b = draw(19, 23) + 1j * draw(19, 23), draw(23, 11) + 1j * draw(23, 11)
    compare(mx.array(a) @ mx.array(b), a @ b)
    a, b = random.standard_normal((37, 70)), random.standard_normal((70, 29))
    x, y = mx.array(a, dtype=mx.float64), mx.array(b, dtype=mx.float64)
    double = float(np.abs(np.array(x @ y) - a @ b).max())
print(json.dumps({"single": worst, "double": double}))
"""


def run_python(code, **environment):
    """Run `code` in a fresh process that starts without the caller's choices, and parse what it prints."""
    inherited = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def netlib():
    """The reference BLAS in MLX's wheel: a stand-in for a library of the system, since it has plain names."""
    spec = util.find_spec("mlx.core")
    return next(Path(spec.origin).parents[1].glob("mlx_cpu.libs/libblas-*.so*"))


@linux_cpu
def test_the_openblas_of_numpy_is_used():
    found = run_python(LOAD + REPORT)
    assert found["tuned"]
    assert found["hint"] is None
    assert "openblas" in Path(found["path"]).name
    assert found["path"] in found["mapped"]


@linux_cpu
@pytest.mark.parametrize("before", ["", "import numpy\n"])
def test_products_are_right(before):
    worst = run_python(before + LOAD + "assert blas.tuned\n" + COMPARE)
    assert worst["single"] < 2e-6
    assert worst["double"] < 1e-12


@linux_cpu
@pytest.mark.parametrize("variable", SWITCHES)
def test_off_leaves_mlx_alone(variable):
    found = run_python(LOAD + REPORT, **{variable: "off"})
    assert not found["tuned"]
    assert found["path"] is None
    assert variable in found["hint"]
    assert "openblas" not in found["mapped"]


@linux_cpu
@pytest.mark.parametrize("variable", SWITCHES)
def test_an_unknown_choice_is_named(variable):
    found = run_python(LOAD + REPORT, **{variable: "fast"})
    assert not found["tuned"]
    assert "'fast'" in found["hint"]
    assert variable in found["hint"]


@linux_cpu
def test_the_former_name_counts_only_where_the_new_one_is_not_set():
    assert run_python(LOAD + REPORT, TURBOQUANT_BLAS="numpy", PIPELINE_BLAS="off")["tuned"]
    assert not run_python(LOAD + REPORT, TURBOQUANT_BLAS="", PIPELINE_BLAS="off")["tuned"]


@linux_cpu
def test_loading_after_mlx_is_too_late_and_the_hint_says_so():
    found = run_python("import mlx.core\n" + LOAD + REPORT)
    assert not found["tuned"]
    assert "before" in found["hint"]


@linux_cpu
def test_the_library_of_the_system_can_be_chosen(tmp_path):
    (tmp_path / "libopenblas.so.0").symlink_to(netlib())
    found = run_python(LOAD + REPORT, TURBOQUANT_BLAS="system", LD_LIBRARY_PATH=str(tmp_path))
    assert found["tuned"]
    assert found["path"] == str(tmp_path / "libopenblas.so.0")


@linux_cpu
def test_a_slow_preloaded_library_is_reported():
    found = run_python(LOAD + REPORT, LD_PRELOAD=str(netlib()))
    assert not found["tuned"]
    assert "LD_PRELOAD" in found["hint"]


@linux_cpu
def test_a_temporary_file_is_used_where_memory_files_cannot_be_executed(tmp_path):
    forbid = "import os\ndef fail(*_): raise PermissionError\nos.memfd_create = fail\n"
    found = run_python(forbid + LOAD + REPORT, TMPDIR=str(tmp_path))
    assert found["tuned"]
    assert list(tmp_path.iterdir()) == []


@linux_cpu
def test_a_library_that_multiplies_wrongly_is_refused():
    """A function that does nothing must not become the process's BLAS."""
    code = """
import ctypes, json
from turboquant.runtime import blas, cblas_shim
nothing = ctypes.CDLL(None).getpid
address = ctypes.cast(nothing, ctypes.c_void_p).value
refused = not cblas_shim.export({name: address for name in cblas_shim.TARGETS})
print(json.dumps({"refused": refused, "global": blas._global_gemm()}))
"""
    assert run_python(code) == {"refused": True, "global": None}


@linux_cpu
def test_the_user_s_number_of_threads_is_respected():
    code = (
        LOAD
        + """
import ctypes
print(json.dumps([blas.threads, ctypes.CDLL(blas.path).scipy_openblas_get_num_threads64_()]))
"""
    )
    assert run_python(code, OPENBLAS_NUM_THREADS="1") == [1, 1]
    assert run_python("import numpy\n" + code, OMP_NUM_THREADS="1") == [1, 1]


def test_threads_default_to_the_usable_cpus():
    code = """
import json, os
from turboquant.runtime.blas import set_threads
from turboquant.runtime.machine import usable_cpus
print(json.dumps([set_threads(), usable_cpus(), int(os.environ["OPENBLAS_NUM_THREADS"])]))
"""
    threads, usable, variable = run_python(code)
    assert threads == usable == variable >= 1


def test_loading_twice_gives_the_same_description():
    code = "from turboquant.runtime.blas import blas_in_use\n"
    assert run_python(LOAD + code + "print(json.dumps(load_tuned_blas() is blas and blas_in_use() is blas))")


def test_measure_gflops():
    assert run_python(LOAD + "from turboquant.runtime.blas import measure_gflops\nprint(measure_gflops(64, 0.01))") > 0


# ---- where it is loaded


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--help"],
        ["chat", "--help"],
        ["server", "--help"],
        ["bench", "--tokens", "64", "--rows", "1"],
        ["fidelity", "--model", str(DEMO), "--text", str(ROOT / "README.md"), "--context", "64", "--bits", "4"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_loads_the_blas_before_it_imports_numpy_or_mlx(command, tmp_path):
    module, *arguments = command
    assert imports_of(tmp_path, ["-m", f"turboquant.{module}", *arguments]) == [{"numpy": "after", "mlx.core": "after"}]


def test_imports_that_come_too_early_would_be_noticed(tmp_path):
    early = imports_of(tmp_path, ["-c", "import numpy\n" + LOAD + "import mlx.core"])
    assert early == [{"numpy": "before", "mlx.core": "after"}]
    assert imports_of(tmp_path, ["-c", "import mlx.core\n" + LOAD])[0]["mlx.core"] == "before"


def test_only_the_entries_of_processes_load_it():
    entries = {
        "pipeline/api.py",
        "pipeline/cli.py",  # the worker of a rank
        "pipeline/commands/bench.py",  # the process of a baseline
        "pipeline/commands/console.py",
        "pipeline/execution/lease_worker.py",
        "pipeline/execution/worker.py",
        "turboquant/bench.py",
        "turboquant/chat.py",
        "turboquant/fidelity.py",
        "turboquant/generate.py",
        "turboquant/runtime/blas.py",
        "turboquant/server.py",
    }
    files = [file for package in ("pipeline", "turboquant") for file in (ROOT / package).rglob("*.py")]
    calling = [file for file in files if "load_tuned_blas()" in file.read_text(encoding="utf-8")]
    assert {str(file.relative_to(ROOT)) for file in calling} == entries


def test_environment_variables_are_used_in_three_places():
    files = (ROOT / "turboquant").rglob("*.py")
    using = {file.name for file in files if re.search(r"os\.environ|getenv", file.read_text("utf-8"))}
    assert using == {"blas.py", "cache_folders.py", "imported.py"}
