"""Kernels of ``text/`` started on MLX's GPU, and tried before they are relied on.

On CUDA a kernel is compiled once a machine (programs.py). On Metal, and where that is not possible, MLX compiles it
once a process. Knows nothing of what a kernel computes.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from turboquant.kernels import programs, trials
from turboquant.kernels.kernel_text import Beginning, Input, Launch, defines, text

_log = logging.getLogger(__name__)


def launch(what: Launch, inputs: Sequence[Input]) -> list[mx.array]:
    """Run a kernel on its inputs; returns its outputs."""
    if gpu() == "cuda":
        found = programs.launch(what, inputs)
        if found is not None:
            return found
    names = tuple(name for name, _, _ in what.outputs)
    kernel = _kernel(what.name, what.constants, what.headers, what.inputs, names, what.strided)
    outputs: list[mx.array] = kernel(
        inputs=[x.slice() if isinstance(x, Beginning) else x for x in inputs],
        grid=(what.groups[0] * what.threads, *what.groups[1:]),
        threadgroup=(what.threads, 1, 1),
        output_shapes=[shape for _, shape, _ in what.outputs],
        output_dtypes=[dtype for _, _, dtype in what.outputs],
    )
    return outputs


def runs(what: str, error: Callable[[], float], most: float, of: object = None) -> bool:
    """Whether kernels run on this device and are wrong by at most ``most``; a warning says where not.

    error: tries them and returns by how much they are wrong. It may raise, for example on a device too old for them.
    of: what else decides the result, such as a codec. A trial that went well is remembered on this machine.
    """
    if trials.remembered(what, of, most):
        return True
    try:
        found = error()
    except (RuntimeError, ValueError) as failed:
        why = str(failed).partition("\n")[0]  # a compiler's message can be long
        _log.warning("%s don't run on this device, so MLX's operations are used: %s", what, why)
        return False
    if not found <= most:
        _log.warning("%s are wrong by %.1g on this device, so MLX's operations are used", what, found)
        return False
    trials.remember(what, of, found)
    return True


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
