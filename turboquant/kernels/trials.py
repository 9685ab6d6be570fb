"""The results of trials of kernels on this machine, remembered for later processes.

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
from turboquant.quant.cache_codec import CacheCodec
from turboquant.runtime.device import on_cpu

_found: dict[str, float] = {}  # errors by the name of the kernels, for people


def remembered(what: str, of: object, most: float) -> bool:
    """Return whether an earlier trial is remembered that had an error of at most ``most``."""
    if on_cpu():  # a test with an emulator
        return False
    read = compiled_files().read("trial", _key(what, of))
    try:
        error = float(read[0]) if read is not None else None
    except ValueError:
        return False
    if error is None or not error <= most:
        return False
    _found[_label(what, of)] = error
    return True


def remember(what: str, of: object, error: float) -> None:
    """Remember the error that a trial measured."""
    if not on_cpu():
        _found[_label(what, of)] = error
        about = {"what": what, "of": repr(of), "device": str(mx.device_info().get("device_name", ""))}
        compiled_files().write("trial", _key(what, of), repr(error).encode(), about)


def found() -> dict[str, float]:
    """Return the errors in the trials that this process relies on, by the name of the kernels."""
    return dict(_found)


def _label(what: str, of: object) -> str:
    """Return the name of kernels for people.

    >>> _label("attention kernels", (CacheCodec(4, 3), 128))
    'attention kernels, 4/3 bits, 128'
    >>> _label("attention kernels", (CacheCodec(4, 3, coding="trellis"), 128))
    'attention kernels, 4/3 bits trellis, 128'
    """
    parts = () if of is None else of if isinstance(of, tuple) else (of,)
    return ", ".join((what, *(_bits(part) if isinstance(part, CacheCodec) else str(part) for part in parts)))


def _bits(codec: CacheCodec) -> str:
    return f"{codec.key_bits}/{codec.value_bits} bits" + ("" if codec.coding == "scalar" else f" {codec.coding}")


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
    """Return a digest of the kernels' texts, and of the Python files that start them or define what is right."""
    digest = hashlib.sha256()
    folders = [resources.files("turboquant") / name for name in ("kernels", "kernels/text", "attention", "quant")]
    for folder in folders:
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if file.name.endswith((".py", ".h")):
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
