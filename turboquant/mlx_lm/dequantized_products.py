"""Products with quantised weights, for many rows on CUDA: weights are dequantised first, and multiplied as usual.

MLX's kernel for quantised products dequantises while it multiplies. For the thousands of rows of a prefill's step it
reaches a fraction of the speed of an ordinary product. The results are equal up to rounding.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from turboquant.mlx_lm.patch import replaced
from turboquant.runtime.device import device_family

FEWEST_ROWS = 256  # for fewer, MLX's kernel is about as fast
_mlx_quantized_matmul = mx.quantized_matmul


@contextlib.contextmanager
def dequantized_products() -> Iterator[None]:
    """While the block runs on CUDA, MLX multiplies many rows by a quantised matrix by dequantising the matrix."""
    if device_family() != "cuda":
        yield
        return
    with replaced((sys.modules[mx.__name__], "quantized_matmul", quantized_matmul)):
        yield


def quantized_matmul(
    x: mx.array,
    w: mx.array,
    /,
    scales: mx.array,
    biases: mx.array | None = None,
    transpose: bool = True,
    **options: Any,
) -> mx.array:
    """Compute ``mx.quantized_matmul``, with FEWEST_ROWS rows or more by a dequantised matrix where that is as exact."""
    one_matrix = w.ndim == 2 and transpose and biases is not None and x.dtype == scales.dtype
    if not one_matrix or x.size // x.shape[-1] < FEWEST_ROWS:
        return _mlx_quantized_matmul(x, w, scales, biases, transpose, **options)
    return x @ mx.dequantize(w, scales, biases, **options).T
