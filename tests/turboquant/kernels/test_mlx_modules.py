"""MLX's own compiled kernels: kept whole and verified between processes, in a folder that each process has alone."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import mlx.core as mx
import pytest

from turboquant.kernels import mlx_modules
from turboquant.kernels.compiled_files import CompiledFiles
from turboquant.runtime import cache_folders


def a_cubin(size: int = 300) -> bytes:
    """An ELF file whose header says that its sections' headers are its end."""
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<QQ", header, 32, 64, size - 64)
    struct.pack_into("<HHHH", header, 54, 56, 1, 64, 1)
    return bytes(header) + bytes(size - 64)


def as_mlx_does(folder: Path, module: str, code: bytes, names: str = "a\tb\n", source: bool = True) -> None:
    """Files as MLX writes them, the source last."""
    path = folder / f"{module}.ptx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(code)
    path.with_suffix(".txt").write_text(names)
    if source:
        path.with_suffix(".cu").write_text("source")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Those of two processes of a machine."""
    monkeypatch.setattr(mlx_modules, "compiled_files", lambda: CompiledFiles(tmp_path / "cache"))
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    return one, other


def test_what_one_process_compiled_the_next_one_finds(folders: tuple[Path, Path]) -> None:
    one, other = folders
    as_mlx_does(one, "gather_float32", a_cubin())
    as_mlx_does(one, "long/name", b".version 8.0\n.entry a() { }\n\0")
    assert mlx_modules.keep(one, set()) == 2
    assert mlx_modules.fill(other) == {"gather_float32.ptx", "long/name.ptx"}
    for name in ("gather_float32.ptx", "gather_float32.txt", "long/name.ptx", "long/name.txt"):
        assert (other / name).read_bytes() == (one / name).read_bytes()
    assert mlx_modules.keep(other, {"gather_float32.ptx", "long/name.ptx"}) == 0


def test_what_is_half_written_is_not_kept(folders: tuple[Path, Path]) -> None:
    one, other = folders
    as_mlx_does(one, "half", a_cubin()[:200])
    as_mlx_does(one, "nothing", b"")
    as_mlx_does(one, "without_names", a_cubin(), names="")
    as_mlx_does(one, "half_a_name", a_cubin(), names="a\tb\nc")
    as_mlx_does(one, "half_a_text", b".version 8.0\n.entry a() {")
    as_mlx_does(one, "still_being_written", a_cubin(), source=False)
    assert mlx_modules.keep(one, set()) == 0
    assert mlx_modules.fill(other) == set()


def test_a_damaged_file_is_left_out(folders: tuple[Path, Path]) -> None:
    one, other = folders
    as_mlx_does(one, "gather", a_cubin())
    mlx_modules.keep(one, set())
    (path,) = mlx_modules.compiled_files().folder.iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert mlx_modules.fill(other) == set()


def test_nothing_is_written_outside_of_the_folder(folders: tuple[Path, Path]) -> None:
    one, _ = folders
    for number, module in enumerate(("../escaped.ptx", "/tmp/escaped.ptx", "a/../../escaped.ptx")):
        about = {"module": module, "code_bytes": 3}
        mlx_modules.compiled_files().write(mlx_modules._name(), str(number), b"codenames\n", about)
    assert mlx_modules.fill(one) == set()
    assert list(one.parent.glob("**/escaped.*")) == []


@pytest.mark.parametrize("chosen", [True, False])
def test_the_folder_that_a_user_chose_is_left_alone(
    chosen: bool, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("atexit.register", lambda *_: None)
    monkeypatch.setenv(cache_folders.MLX_VARIABLE, str(folders[0]))
    monkeypatch.setenv(cache_folders.OUR_VARIABLE, "" if chosen else str(folders[0]))  # else a parent process made it
    mlx_modules.own_folder.cache_clear()
    found = mlx_modules.own_folder()
    mlx_modules.own_folder.cache_clear()
    assert (found is None) == chosen
    assert os.environ[cache_folders.MLX_VARIABLE] == str(folders[0] if chosen else found)


def test_folders_of_processes_that_were_killed_are_removed(tmp_path: Path) -> None:
    mine = tmp_path / f"{mlx_modules.PREFIX}{os.getpid()}-abc"
    gone = tmp_path / f"{mlx_modules.PREFIX}{2**22 + 7}-abc"  # more than Linux gives numbers to
    other = tmp_path / "turboquant-other"
    for folder in (mine, gone, other):
        folder.mkdir()
    mlx_modules._remove_abandoned(tmp_path)
    assert mine.exists()
    assert other.exists()
    assert not gone.exists()
