"""`pipeline doctor`: the checks, and how they are shown."""

import base64
import hashlib
import json
from importlib import metadata

import pytest

from pipeline.commands import doctor
from pipeline.commands.doctor import Check, as_json, check_installed_files, examine, render
from tests.pipeline.command_line import invoke
from turboquant.runtime.blas import Blas


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """A fast examination: measured speeds are replaced, everything else is this machine's."""
    monkeypatch.setattr(doctor, "measure_gflops", lambda size=1024: 50.0)
    return {check.name: check for check in examine(tmp_path / "not" / "there")}


def test_all_parts_of_the_machine_are_checked(checks):
    assert {
        "Python",
        "CPUs, memory",
        "installation",
        "mlx",
        "mlx-lm",
        "numpy",
        "pyarrow",
        "device",
        "matmul",
        "disk",
    } <= set(checks)
    assert "GB free" in checks["disk"].value
    assert "50 GFLOP/s" in checks["matmul"].value


def test_only_failures_come_with_a_fix(checks):
    assert all((check.fix is not None) == (check.ok is False) for check in checks.values())


def test_slow_matrix_products_get_the_hint_of_the_blas(monkeypatch):
    monkeypatch.setattr(doctor, "measure_gflops", lambda: 3.0)
    check = doctor.check_speed(Blas("Netlib", None, 1, False, "install OpenBLAS"))
    assert (check.ok, check.fix) == (False, "install OpenBLAS")
    check = doctor.check_speed(Blas("OpenBLAS", None, 2, True, None))
    assert check.ok is False
    assert "OPENBLAS_NUM_THREADS" in check.fix


@pytest.mark.parametrize(("supported", "ok"), [("<99,>=0.1", True), (">=99", False), (None, None)])
def test_versions_are_judged_by_the_supported_range(monkeypatch, supported, ok):
    monkeypatch.setattr(doctor, "supported_range", lambda name: supported)
    check = doctor.check_version("numpy")
    assert check.ok is ok
    assert (check.fix is not None) == (ok is False)


def test_a_missing_package_is_to_be_installed(monkeypatch):
    monkeypatch.setattr(doctor, "supported_range", lambda name: ">=1")
    check = doctor.check_version("no-such-distribution")
    assert (check.ok, check.fix) == (False, "pip install 'no-such-distribution>=1'")


def test_the_version_of_mlx_lm_that_was_tested_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "supported_range", lambda name: ">=0.32.2")
    assert "; tested with 0.32.2)" in doctor.check_version("mlx-lm").value


def test_supported_range_comes_from_the_metadata(monkeypatch):
    stated = ["mlx>=0.3; sys_platform == 'darwin'", "mlx-lm<2,>=1", "mlx[cpu]>=0.3; extra == 'cpu'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: stated)
    assert [doctor.supported_range(name) for name in ("mlx", "mlx-lm", "numpy")] == [">=0.3", "<2,>=1", None]


# ---- the installed files


def install(site, name, files):
    """Write files and a RECORD of them, as pip does."""
    lines = []
    for file, content in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).decode().rstrip("=")
        lines.append(f"{file},sha256={digest},{len(content)}")
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("\n".join([*lines, "pipeline/__pycache__/cli.pyc,,"]) + "\n")


def installation(site):
    return check_installed_files(metadata.distributions(path=[str(site)]))


OURS = {"pipeline/__init__.py": "", "pipeline/cli.py": "ours", "turboquant/codec.py": "ours"}


def test_files_as_they_were_installed_are_good(tmp_path):
    install(tmp_path, "turboquant-pipeline", OURS)
    install(tmp_path, "numpy", {"numpy/__init__.py": ""})
    check = installation(tmp_path)
    assert (check.ok, check.fix) == (True, None)
    assert check.value == "the 3 files of pipeline/ and turboquant/ are as installed"


def test_another_distribution_that_has_overwritten_files_is_named(tmp_path):
    install(tmp_path, "turboquant-pipeline", OURS)
    install(tmp_path, "turboquant", {"turboquant/codec.py": "theirs", "turboquant/more.py": ""})
    check = installation(tmp_path)
    assert check.ok is False
    assert "turboquant also has files in pipeline/ and turboquant/" in check.value
    assert "1 of 3 files of pipeline/ and turboquant/ were changed, such as turboquant/codec.py" in check.value
    assert check.fix == ("pip uninstall -y turboquant && pip install --force-reinstall --no-deps turboquant-pipeline")


def test_a_distribution_that_our_files_have_overwritten_is_named_too(tmp_path):
    install(tmp_path, "pipeline", {"pipeline/cli.py": "theirs"})
    install(tmp_path, "turboquant-pipeline", OURS)
    check = installation(tmp_path)
    assert (check.ok, check.value) == (False, "pipeline also has files in pipeline/ and turboquant/")


def test_a_changed_or_lost_file_is_noticed(tmp_path):
    install(tmp_path, "turboquant-pipeline", OURS)
    (tmp_path / "pipeline" / "cli.py").unlink()
    check = installation(tmp_path)
    assert check.ok is False
    assert "1 of 3 files" in check.value
    assert check.fix == "pip install --force-reinstall --no-deps turboquant-pipeline"


def test_a_source_folder_has_no_record_to_compare_with(tmp_path):
    install(tmp_path, "turboquant-pipeline", {"_editable_turboquant_pipeline.pth": "/src"})
    assert installation(tmp_path) == Check("installation", "run from a source folder")


# ---- disk, and how checks are shown


def test_little_disk_space_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "LEAST_FREE_DISK", float("inf"))
    assert "cache.dir" in doctor.check_disk(tmp_path).fix


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
