"""Kernels written once for CUDA and Metal: how their text is put together, started, and tried before it is relied on.

The text lies in ``text/``: a body for each kernel, plain C++ but for what ``cuda.h`` and ``metal.h`` define, so a C++
compiler can run it where there is no GPU. Knows nothing of what a kernel computes.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import mlx.core as mx

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """A kernel of ``text/`` and how it is started: ``groups`` thread-groups of so many threads.

    constants: what is compiled in. outputs: names, shapes and dtypes. headers: texts that the body needs. strided: the
    body reads inputs as they lie, by their strides; else those that are not contiguous are copied.
    """

    name: str
    constants: tuple[tuple[str, int | float], ...]
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, tuple[int, ...], mx.Dtype], ...]
    groups: tuple[int, int, int]
    threads: int
    headers: tuple[str, ...] = ()
    strided: bool = False


def launch(what: Launch, inputs: list[mx.array]) -> list[mx.array]:
    """Run a kernel on its inputs; returns its outputs."""
    names = tuple(name for name, _, _ in what.outputs)
    kernel = _kernel(what.name, what.constants, what.headers, what.inputs, names, what.strided)
    found: list[mx.array] = kernel(
        inputs=inputs,
        grid=(what.groups[0] * what.threads, *what.groups[1:]),
        threadgroup=(what.threads, 1, 1),
        output_shapes=[shape for _, shape, _ in what.outputs],
        output_dtypes=[dtype for _, _, dtype in what.outputs],
    )
    return found


def runs(what: str, error: Callable[[], float], most: float) -> bool:
    """Whether kernels run on this device and are wrong by no more than ``most``; a warning says where not.

    error: tries them, and says by how much they are wrong. A device may be too old for them.
    """
    try:
        found = error()
    except (RuntimeError, ValueError) as failed:
        why = str(failed).partition("\n")[0]  # a compiler's message can be long
        _log.warning("%s don't run on this device, so MLX's operations are used: %s", what, why)
        return False
    if not found <= most:
        _log.warning("%s are wrong by %.1g on this device, so MLX's operations are used", what, found)
    return found <= most


def text(name: str) -> str:
    """A file of the kernels' text."""
    return (resources.files("turboquant.kernels") / "text" / name).read_text(encoding="utf-8")


def defines(constants: tuple[tuple[str, int | float], ...]) -> str:
    """The constants as the preprocessor takes them."""
    lines = (f"#define {name} {value}{'f' if isinstance(value, float) else ''}\n" for name, value in constants)
    return "".join(lines)


def gpu() -> str:
    """The backend of MLX's GPU, which is the name of its header: ``cuda`` or ``metal``."""
    return "metal" if mx.metal.is_available() else "cuda"


@functools.cache
def _kernel(
    name: str,
    constants: tuple[tuple[str, int | float], ...],
    headers: tuple[str, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    strided: bool,
) -> Any:
    make = mx.fast.metal_kernel if gpu() == "metal" else mx.fast.cuda_kernel
    header = defines(constants) + "".join(text(file) for file in (f"{gpu()}.h", *headers))
    label = f"{name}_{hashlib.sha256(header.encode()).hexdigest()[:16]}"
    body = (text("metal_positions.h") if gpu() == "metal" else "") + text(f"{name}.h")
    return make(label, list(inputs), list(outputs), body, header=header, ensure_row_contiguous=not strided)
