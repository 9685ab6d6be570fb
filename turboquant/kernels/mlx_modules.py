"""The folder in which MLX for CUDA looks for compiled kernels. Each process has one, filled from the user's cache.

MLX writes compiled kernels into that folder in place and without a checksum: if a process is killed while it writes,
the next one loads half a file. The default folder is a temporary one, which the system may remove. So each process
gets a folder of its own with all kernels that were kept and verified. The kernels that MLX adds are kept when the
process ends. If the user has chosen a folder with MLX_PTX_CACHE_DIR, it is used as it is.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from turboquant.kernels.compiled_files import compiled_files, key_of
from turboquant.runtime.cache_folders import set_mlx_folder, user_chose_mlx_folder

_log = logging.getLogger(__name__)
PREFIX = "turboquant-kernels-"


@functools.cache
def own_folder() -> Path | None:
    """Return this process's folder, made and filled at the first call; None if there is none or the user chose it.

    To be called before MLX compiles its first kernel, which is when MLX reads the variable.
    """
    if not mx.cuda.is_available():
        return None
    if user_chose_mlx_folder():
        return None
    try:
        _remove_abandoned(Path(tempfile.gettempdir()))
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        known = fill(folder)
    except OSError:
        return None
    if not known:
        _log.warning("kernels are compiled, once on this machine: the first answers take longer")
    set_mlx_folder(folder)
    atexit.register(_end, folder, known, os.getpid())
    return folder


def fill(folder: Path) -> set[str]:
    """Write all kernels that were kept from MLX into a folder, and return the names of their files."""
    known = set()
    for key in compiled_files().keys(_name()):
        found = compiled_files().read(_name(), key)
        if found is None:
            continue
        content, about = found
        module, size = about.get("module"), about.get("code_bytes")
        if not isinstance(module, str) or not isinstance(size, int) or not is_inside(folder, module):
            continue
        path = folder / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content[:size])
        path.with_suffix(".txt").write_bytes(content[size:])
        known.add(module)
    return known


def keep(folder: Path, known: set[str]) -> int:
    """Keep the kernels that MLX has added to a folder, all except the files ``known``, and return their number."""
    kept = 0
    for path in sorted(folder.rglob("*.ptx")):
        module = str(path.relative_to(folder))
        source = path.with_suffix(".cu")  # MLX writes this last; kernels of launch.py have none
        if module in known or not source.exists():
            continue
        code, names = path.read_bytes(), path.with_suffix(".txt").read_bytes()
        if is_complete(code) and names.endswith(b"\n"):
            about = {"module": module, "code_bytes": len(code)}
            compiled_files().write(_name(), key_of(module), code + names, about)
            kept += 1
    return kept


def is_complete(code: bytes) -> bool:
    """Return whether a compiled file is complete: machine code by its header, PTX text by its last bracket."""
    if code[:4] != b"\x7fELF":
        return code.rstrip(b"\0\n ").endswith(b"}")
    start, entry, count = (int.from_bytes(code[at : at + size], "little") for at, size in ((40, 8), (58, 2), (60, 2)))
    program, program_entry, programs = (
        int.from_bytes(code[at : at + size], "little") for at, size in ((32, 8), (54, 2), (56, 2))
    )
    return len(code) >= 64 and len(code) >= max(start + entry * count, program + program_entry * programs)


def is_inside(folder: Path, name: str) -> bool:
    """Return whether a file of this name would be inside the folder."""
    return not os.path.isabs(name) and (folder / name).resolve().is_relative_to(folder.resolve())


def _name() -> str:
    return f"mlx-{metadata.version('mlx')}-{mx.device_info().get('architecture', '')}"


def _end(folder: Path, known: set[str], process: int) -> None:
    if os.getpid() != process:  # a fork of it
        return
    with contextlib.suppress(OSError):
        keep(folder, known)
        compiled_files().remove_unused()
    shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(temporary: Path) -> None:
    """Remove folders of this user's processes that ended without doing so."""
    for folder in temporary.glob(f"{PREFIX}*"):
        process = folder.name.removeprefix(PREFIX).partition("-")[0]
        if process.isdigit() and not _runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
