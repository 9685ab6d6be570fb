"""NumPy in place of two MLX functions that are slow on a CPU: SwiGLU, and the log-sum-exp of logits.

Both spend their time on exponentials, which MLX computes one at a time and on one core. The results are equal up to
rounding.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from numpy.typing import NDArray

from turboquant.mlx_lm.internals import STOCK_SWIGLU, SWIGLU
from turboquant.mlx_lm.patch import modules_of, replaced
from turboquant.runtime.device import on_cpu
from turboquant.runtime.threads import run_in_parallel

BLOCK = 1 << 16  # numbers that one thread takes at a time: about the size of a core's cache
_mlx_logsumexp = mx.logsumexp


@contextlib.contextmanager
def numpy_functions(model: Module) -> Iterator[None]:
    """While the block runs on a CPU, ``model`` computes SwiGLU, and MLX the log-sum-exp of float32 rows, by NumPy."""
    if not on_cpu():
        yield
        return
    modules = [module for module in modules_of(model) if vars(module).get(SWIGLU) is STOCK_SWIGLU]
    with replaced(
        *((module, SWIGLU, swiglu) for module in modules), (sys.modules[mx.__name__], "logsumexp", logsumexp)
    ):
        yield


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return silu(gate) * x, for arrays of one shape."""
    if gate.dtype != mx.float32 or x.dtype != mx.float32 or gate.shape != x.shape:
        return STOCK_SWIGLU(gate, x)
    gates, factors = (np.asarray(each).reshape(-1) for each in (gate, x))
    output = np.empty_like(gates)

    def compute(start: int) -> None:
        some = slice(start, start + BLOCK)
        part = np.negative(gates[some], out=output[some])
        with np.errstate(over="ignore"):  # of a gate far below zero, whose silu is zero
            np.exp(part, out=part)
        part += 1
        np.divide(gates[some], part, out=part)
        part *= factors[some]

    run_in_parallel(compute, range(0, len(output), BLOCK))
    return mx.array(output.reshape(gate.shape))


def logsumexp(a: mx.array, /, axis: Any = None, keepdims: bool = False, **options: Any) -> mx.array:
    """Compute ``mx.logsumexp``; on a CPU, over the last axis of float32 rows, by NumPy."""
    of_rows = isinstance(axis, int) and axis in (-1, a.ndim - 1) and a.dtype == mx.float32 and a.size > 0
    if options or not of_rows or not on_cpu():
        return _mlx_logsumexp(a, axis=axis, keepdims=keepdims, **options)
    rows: NDArray[np.float32] = np.asarray(a).reshape(-1, a.shape[-1])
    together = max(1, BLOCK // a.shape[-1])

    def compute(start: int) -> NDArray[np.float32]:
        some = rows[start : start + together]
        highest = some.max(axis=-1, keepdims=True)
        finite = np.where(np.isfinite(highest), highest, np.float32(0))
        shifted = some - finite
        with np.errstate(divide="ignore"):
            sums: NDArray[np.float32] = finite + np.log(np.exp(shifted, out=shifted).sum(axis=-1, keepdims=True))
        return sums

    result = np.concatenate(run_in_parallel(compute, range(0, len(rows), together)))
    return mx.array(result.reshape(*a.shape[:-1], *([1] if keepdims else [])))
