"""NumPy in place of MLX functions that are slow on a CPU.

SwiGLU and the log-sum-exp of logits spend their time on exponentials, which MLX computes one at a time and on one core.
RMSNorm and RoPE are made of several passes there, also on one core. A product of a few rows spends its time in the
BLAS, which first copies all weights in the order of its kernel, as for a large product. The results are equal up to
rounding.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from numpy.typing import NDArray

from turboquant.mlx_lm.internals import STOCK_SWIGLU, SWIGLU
from turboquant.mlx_lm.patch import modules_of, replaced
from turboquant.runtime.device import on_cpu
from turboquant.runtime.threads import run_in_parallel

BLOCK = 1 << 16  # numbers that one thread takes at a time: about the size of a core's cache
FEW_ROWS = 64  # a product of more rows goes to the BLAS as it is
UNCOPIED = 16  # products of up to this many rows are cut into blocks that OpenBLAS multiplies without copies
OUTPUTS, STRIPE = 64, 256  # outputs in such a block, and in the blocks that one thread takes at a time
_mlx_logsumexp, _mlx_linear, _mlx_as_linear = mx.logsumexp, Linear.__call__, Embedding.as_linear
_mlx_rms_norm, _mlx_rope = mx.fast.rms_norm, mx.fast.rope


@contextlib.contextmanager
def numpy_functions(model: Module) -> Iterator[None]:
    """While the block runs on a CPU, NumPy computes the functions of this module."""
    if not on_cpu():
        yield
        return
    modules = [module for module in modules_of(model) if vars(module).get(SWIGLU) is STOCK_SWIGLU]
    with replaced(
        *((module, SWIGLU, swiglu) for module in modules),
        (sys.modules[mx.__name__], "logsumexp", logsumexp),
        (sys.modules[mx.fast.__name__], "rms_norm", rms_norm),
        (sys.modules[mx.fast.__name__], "rope", rope),
        (Linear, "__call__", linear),
        (Embedding, "as_linear", as_linear),
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


def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **options: Any) -> mx.array:
    """Compute ``mx.fast.rms_norm``; on a CPU, of float32 arrays, by NumPy."""
    is_float32 = x.dtype == mx.float32 and (weight is None or weight.dtype == mx.float32)
    if options or not is_float32 or not on_cpu():
        return _mlx_rms_norm(x, weight, eps, **options)
    dim = x.shape[-1]
    rows, factors = np.asarray(x).reshape(-1, dim), None if weight is None else np.asarray(weight)
    output = np.empty_like(rows)
    together = max(1, BLOCK // dim)

    def compute(start: int) -> None:
        some = slice(start, start + together)
        squares = np.einsum("rd,rd->r", rows[some], rows[some])[:, None]
        part = np.divide(rows[some], np.sqrt(squares / np.float32(dim) + np.float32(eps)), out=output[some])
        if factors is not None:
            part *= factors

    run_in_parallel(compute, range(0, len(rows), together))
    return mx.array(output.reshape(x.shape))


def rope(a: mx.array, dims: int, *, offset: int | mx.array, traditional: bool, **options: Any) -> mx.array:
    """Compute ``mx.fast.rope``; on a CPU, of float32 arrays whose dimensions are rotated in halves, by NumPy."""
    if traditional or a.dtype != mx.float32 or a.size == 0 or not on_cpu():
        return _mlx_rope(a, dims, offset=offset, traditional=traditional, **options)
    freqs = options.pop("freqs", None)
    offsets = (offset,) if isinstance(offset, int) else tuple(np.asarray(offset).reshape(-1).tolist())
    freqs_as_bytes = None if freqs is None else np.asarray(freqs).tobytes()
    x, half = np.asarray(a), dims // 2
    cosines, sines = (
        np.broadcast_to(table.reshape(len(offsets), *[1] * (x.ndim - 3), -1, half), (*x.shape[:-1], half))
        for table in _rotation(dims, offsets, x.shape[-2], freqs_as_bytes, **options)
    )
    output = np.empty(x.shape, np.float32)

    def rotate(some: tuple[int, ...]) -> None:
        given, rotated, cosine, sine = x[some], output[some], cosines[some], sines[some]
        first, second = given[..., :half], given[..., half:dims]
        rotated[..., :half] = first * cosine - second * sine
        rotated[..., half:dims] = first * sine + second * cosine
        rotated[..., dims:] = given[..., dims:]

    # All at once if that is little, otherwise row by row, otherwise head by head.
    axes = next((n for n in range(x.ndim - 2) if math.prod(x.shape[n:]) <= BLOCK), x.ndim - 2)
    run_in_parallel(rotate, list(np.ndindex(*x.shape[:axes])))
    return mx.array(output)


@functools.lru_cache(maxsize=4)  # the layers of a model share one or two
def _rotation(
    dims: int, offsets: tuple[int, ...], tokens: int, freqs: bytes | None, **options: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return MLX's cosines and sines (rows, tokens, dims / 2) of RoPE: what it makes of ones in the first half.

    offsets: of each row.
    """
    ones = mx.broadcast_to((mx.arange(dims) < dims // 2).astype(mx.float32), (len(offsets), 1, tokens, dims))
    options["freqs"] = None if freqs is None else mx.array(np.frombuffer(freqs, np.float32))
    rotated = np.asarray(_mlx_rope(ones, dims, offset=mx.array(offsets), traditional=False, **options))[:, 0]
    return rotated[..., : dims // 2], rotated[..., dims // 2 :]


def linear(layer: Linear, x: mx.array) -> mx.array:
    """Compute what ``mlx.nn.Linear`` does; of a few float32 rows by NumPy."""
    product = multiply_few(x, layer.weight)
    if product is None:
        output: mx.array = _mlx_linear(layer, x)
        return output
    return product + layer.bias if "bias" in layer else product


def as_linear(layer: Embedding, x: mx.array) -> mx.array:
    """Compute what ``mlx.nn.Embedding.as_linear`` does; of a few float32 rows by NumPy."""
    product = multiply_few(x, layer.weight)
    if product is None:
        output: mx.array = _mlx_as_linear(layer, x)  # type: ignore[no-untyped-call]
        return output
    return product


def multiply_few(x: mx.array, weight: mx.array) -> mx.array | None:
    """Multiply x (..., K) by weight (N, K).

    Returns None where x has one row or many, where one of them is not float32, and on a GPU.

    OpenBLAS's kernels for small matrices read the weights where they are. For somewhat more rows it copies them, and
    that takes less time if the weights are the left factor.
    """
    rows = x.size // x.shape[-1]
    if not 1 < rows <= FEW_ROWS or x.dtype != mx.float32 or weight.dtype != mx.float32 or not on_cpu():
        return None
    columns, weights = np.asarray(x).reshape(rows, -1).T, np.asarray(weight)
    output = np.empty((len(weights), rows), np.float32)

    def multiply(start: int) -> None:
        for first in range(start, min(start + STRIPE, len(weights)), OUTPUTS):
            some = slice(first, first + OUTPUTS)
            np.matmul(weights[some], columns, out=output[some])

    if rows <= UNCOPIED:
        run_in_parallel(multiply, range(0, len(weights), STRIPE))
    else:
        np.matmul(weights, columns, out=output)
    return mx.array(output.T.reshape(*x.shape[:-1], -1))


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
    return mx.array(result.reshape((*a.shape[:-1], *([1] if keepdims else []))))
