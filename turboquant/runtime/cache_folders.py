"""Where the environment says that caches are: the user's, and the one of MLX's compiled CUDA kernels.

XDG_CACHE_HOME is the user's folder for caches on Linux, LOCALAPPDATA on Windows. MLX_PTX_CACHE_DIR is read by MLX when
it compiles its first kernel; TURBOQUANT_PTX_DIR holds what this program set it to, so that its child processes can tell
its choice from the user's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

MLX_VARIABLE, OUR_VARIABLE = "MLX_PTX_CACHE_DIR", "TURBOQUANT_PTX_DIR"


def user_cache_folder() -> Path:
    """Return the user's folder for caches of all programs."""
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    home = Path(os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", ""))
    return home if home.is_absolute() else Path("~/.cache").expanduser()


def user_chose_mlx_folder() -> bool:
    """Return whether the user, and not this program, chose where MLX keeps compiled kernels."""
    chosen = os.environ.get(MLX_VARIABLE)
    return bool(chosen) and chosen != os.environ.get(OUR_VARIABLE)


def set_mlx_folder(folder: Path) -> None:
    """Choose where MLX keeps compiled kernels, in this process and its children."""
    os.environ[MLX_VARIABLE] = os.environ[OUR_VARIABLE] = str(folder)
