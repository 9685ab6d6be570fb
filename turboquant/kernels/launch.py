"""Start the kernels of ``text/`` on MLX's GPU. Each is used only after a trial has shown that its results are right.

On CUDA, programs.py compiles a kernel once on each machine. On Metal, and if that is not possible, MLX compiles it once
in each process.
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
    """Run a kernel on its inputs; returns its outputs. Raises RuntimeError if the kernel cannot be started."""
    if gpu() == "cuda":
        found = programs.launch(what, inputs)
        if found is not None:
            return found
        if what.shared_bytes:
            raise RuntimeError(
                f"NVRTC cannot compile the kernel {what.name}, and MLX cannot start it with so much memory"
            )
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
    """Return whether kernels run on this device with an error of at most ``most``; log a warning if they do not.

    what: the name of the kernels, for messages. error: runs them and returns their error; it may raise, for example on
    a device that is too old. of: other values that decide the result, for example a codec. A trial that succeeded is
    remembered on this machine.
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
    """Return the backend of MLX's GPU, ``cuda`` or ``metal``. The header in ``text/`` has the same name."""
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
