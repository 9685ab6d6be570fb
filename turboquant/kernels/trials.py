"""What trials of kernels found on this machine, remembered for its next processes.

A result counts for the same kernels, MLX, driver and device only. Trials that failed are not remembered.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib import metadata, resources
from pathlib import Path

import mlx.core as mx

from turboquant.kernels.compiled_files import compiled_files, key_of
from turboquant.runtime.device import on_cpu

_found: dict[str, float] = {}  # by what was tried, for those who report


def remembered(what: str, of: object, most: float) -> bool:
    """Whether a trial is known to have gone well, wrong by at most ``most``."""
    if on_cpu():  # a test with an emulator
        return False
    read = compiled_files().read("trial", _key(what, of))
    try:
        error = float(read[0]) if read is not None else None
    except ValueError:
        return False
    if error is None or not error <= most:
        return False
    _found[f"{what}, {of}"] = error
    return True


def remember(what: str, of: object, error: float) -> None:
    """Remember what a trial found."""
    if not on_cpu():
        _found[f"{what}, {of}"] = error
        about = {"what": what, "of": repr(of), "device": str(mx.device_info().get("device_name", ""))}
        compiled_files().write("trial", _key(what, of), repr(error).encode(), about)


def found() -> dict[str, float]:
    """The errors of the trials that this process relies on, by what was tried."""
    return dict(_found)


def _key(what: str, of: object) -> str:
    return key_of(what, of, _machine(), _sources())


@functools.cache
def _machine() -> tuple[str, ...]:
    info = mx.device_info()
    try:
        driver = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        driver = platform.platform()
    return metadata.version("mlx"), str(info.get("device_name", "")), str(info.get("architecture", "")), driver


@functools.cache
def _sources() -> str:
    """A digest of all that the kernels are made of and started by."""
    digest = hashlib.sha256()
    kernels = resources.files("turboquant.kernels")
    files = [*kernels.iterdir(), *(kernels / "text").iterdir(), resources.files("turboquant.attention") / "gpu.py"]
    for file in sorted((file for file in files if file.name.endswith((".py", ".h"))), key=lambda file: file.name):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
