"""MLX's own kernels are compiled ahead by processes that hand them over whole."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from turboquant.kernels import mlx_modules
from turboquant.kernels.compiled_files import CompiledFiles
from turboquant.mlx_lm import kernels_ahead
from turboquant.mlx_lm.kernels_ahead import Quantized
from turboquant.runtime.cache_folders import MLX_VARIABLE


@pytest.mark.parametrize("name", sorted(kernels_ahead.OPERATIONS))
def test_every_operation_runs_with_the_mlx_and_mlx_lm_that_are_installed(name: str) -> None:
    mx.eval(kernels_ahead.OPERATIONS[name](mx.bfloat16, 128))


@pytest.mark.parametrize("how", [Quantized(64, 4), Quantized(32, 8), Quantized(32, 4, "mxfp4")])
@pytest.mark.parametrize("rows", kernels_ahead.ROWS_OF_PRODUCTS)
def test_products_with_quantised_weights_run(rows: int, how: Quantized) -> None:
    assert Quantized.parse(str(how)) == how
    assert kernels_ahead.operation(f"product {rows} {how}")(mx.float16, 128).shape == (1, rows, 1024)


def test_new_kernels_are_handed_over_and_those_of_earlier_runs_are_not(tmp_path: Path) -> None:
    own, folder = tmp_path / "own", tmp_path / "other process"
    (own / "long").mkdir(parents=True)
    folder.mkdir()
    for module in ("known", "gather", "long/name"):
        (own / f"{module}.ptx").write_bytes(b"code of " + module.encode())
        (own / f"{module}.txt").write_text("names")
        (own / f"{module}.cu").write_text("source")
    kernels_ahead.hand_over(own, {"known.ptx"}, folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"gather.ptx", "gather.txt", "long/name.ptx", "long/name.txt"}
    assert (folder / "long/name.ptx").read_bytes() == b"code of long/name"


def test_a_process_that_has_ended_gets_no_kernels(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "gather.ptx").write_bytes(b"code")
    (own / "gather.txt").write_text("names")
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    kernels_ahead.hand_over(own, set(), blocked)
    assert blocked.read_text() == "no folder"


def test_a_process_runs_its_operations_and_notes_that_they_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, folder = tmp_path / "own", tmp_path / "folder"
    own.mkdir()
    folder.mkdir()
    cache = CompiledFiles(tmp_path / "cache")
    for module in (kernels_ahead, mlx_modules):
        monkeypatch.setattr(module, "compiled_files", lambda: cache)
    monkeypatch.setattr(kernels_ahead, "own_folder", lambda: own)
    kernels_ahead.main([str(folder), "float16", "64", "embed", "rotate"])
    assert len(cache.keys("ahead")) == 2


def test_nothing_is_compiled_ahead_without_a_cuda_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MLX_VARIABLE, raising=False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    mlx_modules.own_folder.cache_clear()
    kernels_ahead.start.cache_clear()
    assert kernels_ahead.start(mx.bfloat16, 128) == []


def test_as_many_processes_are_started_as_the_gpu_has_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CompiledFiles(tmp_path / "cache")
    monkeypatch.setattr(kernels_ahead, "compiled_files", lambda: cache)
    monkeypatch.setattr(kernels_ahead, "own_folder", lambda: tmp_path)
    monkeypatch.setattr(mx, "device_info", lambda: {"free_memory": 5 << 30, "architecture": "sm_90"})
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    kernels_ahead.start.cache_clear()
    processes = kernels_ahead.start(mx.bfloat16, 128)
    assert len(processes) == 2
    assert kernels_ahead.start(mx.bfloat16, 128) is processes, "a second call starts nothing"
    asked = [name for process in processes for name in list(process.args)[6:]]  # type: ignore[call-overload]
    assert sorted(asked) == sorted(kernels_ahead.OPERATIONS)
    assert [process.wait() for process in processes] == [0, 0]  # without a GPU they end at once
    for name in kernels_ahead.OPERATIONS:
        cache.write("ahead", kernels_ahead._key(name, mx.bfloat16, 128), b"", {})
    kernels_ahead.start.cache_clear()
    assert kernels_ahead.start(mx.bfloat16, 128) == []
