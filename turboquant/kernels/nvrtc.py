"""Compile CUDA text to machine code with NVRTC, NVIDIA's runtime compiler, which is installed with MLX's CUDA wheels.

This needs no GPU. The library is loaded when it is first needed.
"""

from __future__ import annotations

import ctypes
import functools
import site
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll")


class CannotCompile(RuntimeError):
    """There is no compiler on this machine, or it refuses a text; then its message is quoted."""


def compile_cubin(text: str, architecture: str) -> bytes:
    """Return the machine code of a CUDA text without includes, for an architecture, for example ``sm_90a``.

    Threads may compile at the same time. Raises CannotCompile.
    """
    library, program, options = _library(), ctypes.c_void_p(), (f"--gpu-architecture={architecture}", "--std=c++17")
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None))
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), arguments):
            message = _bytes_of(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise CannotCompile(f"NVRTC refuses a kernel: {message.strip()}")
        return _bytes_of(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def version() -> str:
    """The compiler's version, such as ``13.0``. Raises CannotCompile where there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library(), _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _bytes_of(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(library: Any, result: int) -> None:
    if result:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CannotCompile(f"NVRTC: {library.nvrtcGetErrorString(result).decode()}")


@functools.cache
def _library() -> Any:
    for candidate in _candidates():
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise CannotCompile("NVRTC is not installed: it comes with mlx[cuda13] and mlx[cuda12]")


def _candidates() -> Iterator[str]:
    yield from NAMES  # the one that MLX has loaded, or the system's
    for folder in dict.fromkeys([*sys.path, *site.getsitepackages()]):
        for name in NAMES:
            yield from map(str, Path(folder).glob(f"nvidia/*/lib/{name}"))
