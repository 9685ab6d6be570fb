"""What `pipeline doctor` finds and how it says so."""

import json

import pytest

from pipeline.commands import doctor
from pipeline.commands.doctor import Check, as_json, examine, render
from tests.pipeline.command_line import invoke
from turboquant.runtime.blas import Blas


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """A fast examination: measured speeds are replaced, everything else is this machine's."""
    monkeypatch.setattr(doctor, "measure_gflops", lambda size=1024: 50.0)
    return {check.name: check for check in examine(tmp_path / "not" / "there")}


def test_everything_is_looked_at(checks):
    assert {"Python", "CPUs, memory", "mlx", "mlx-lm", "numpy", "pyarrow", "device", "matmul", "disk"} <= set(checks)
    assert "GB free" in checks["disk"].value
    assert "50 GFLOP/s" in checks["matmul"].value


def test_only_failures_come_with_a_fix(checks):
    assert all((check.fix is not None) == (check.ok is False) for check in checks.values())


def test_slow_matrix_products_get_the_hint_of_the_blas(monkeypatch):
    monkeypatch.setattr(doctor, "measure_gflops", lambda: 3.0)
    check = doctor._check_speed(Blas("Netlib", None, 1, False, "install OpenBLAS"))
    assert (check.ok, check.fix) == (False, "install OpenBLAS")
    check = doctor._check_speed(Blas("OpenBLAS", None, 2, True, None))
    assert check.ok is False
    assert "OPENBLAS_NUM_THREADS" in check.fix


@pytest.mark.parametrize(("supported", "ok"), [("<99,>=0.1", True), (">=99", False), (None, None)])
def test_versions_are_judged_by_the_supported_range(monkeypatch, supported, ok):
    monkeypatch.setattr(doctor, "_supported_range", lambda name: supported)
    check = doctor._check_version("numpy")
    assert check.ok is ok
    assert (check.fix is not None) == (ok is False)


def test_missing_package(monkeypatch):
    monkeypatch.setattr(doctor, "_supported_range", lambda name: ">=1")
    check = doctor._check_version("no-such-distribution")
    assert (check.ok, check.fix) == (False, "pip install 'no-such-distribution>=1'")


def test_supported_range_comes_from_the_metadata(monkeypatch):
    stated = ["mlx>=0.3; sys_platform == 'darwin'", "mlx-lm<2,>=1", "mlx[cpu]>=0.3; extra == 'cpu'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: stated)
    assert [doctor._supported_range(name) for name in ("mlx", "mlx-lm", "numpy")] == [">=0.3", "<2,>=1", None]


def test_little_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "LEAST_FREE_DISK", float("inf"))
    assert "cache.dir" in doctor._check_disk(tmp_path).fix


def test_render_aligns_and_indents():
    table = render([Check("disk", "1 GB free", False, "free some"), Check("Python", "3.12"), Check("numpy", "2", True)])
    assert table.splitlines() == [
        "!!  disk    1 GB free",
        "            -> free some",
        "    Python  3.12",
        "ok  numpy   2",
    ]


def test_json_holds_every_field():
    assert json.loads(as_json([Check("disk", "1 GB free", False, "free some")])) == [
        {"name": "disk", "value": "1 GB free", "ok": False, "fix": "free some"}
    ]


def test_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "measure_gflops", lambda size=1024: 50.0)
    shown, told = invoke("doctor"), invoke("doctor", "--json")
    assert (shown.exit_code, told.exit_code) == (0, 0)
    assert shown.stdout.split()[0] == json.loads(told.stdout)[0]["name"]
