"""Rounding a block of coordinates on a GPU: one thread a vector, CUDA or Metal, from one text.

What it computes is rounding.py's ``round_block``; see there. The text is plain C++ but for ``VECTOR``, the number of
the vector that a thread works on, so a C++ compiler can check it where there is no GPU.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant import rounding
from turboquant.codebook import lloyd_max

THREADS = 128
INPUTS = ["wanted", "unit", "error", "own", "scale", "levels", "code_of_bin", "sizes"]
OUTPUTS = ["codes", "errors"]
LEAST_AGREEMENT = 0.99  # of codes with NumPy's: sums are rounded otherwise, and a tie is a tie

# Arrays as in rounding.round_block; sizes holds H and T. BLOCK, DOWN, BINS and REACH are compiled in.
SOURCE = """
    int tokens = sizes[1];
    int vector = VECTOR;
    if (vector >= sizes[0] * tokens) return;
    int head = vector / tokens, base = head * BLOCK * tokens + vector % tokens;
    float s = scale[vector];
    float changes[BLOCK];
    #pragma unroll
    for (int i = 0; i < BLOCK; ++i) changes[i] = 0;
    #pragma unroll
    for (int n = 0; n < BLOCK; ++n) {
        const int i = DOWN ? BLOCK - 1 - n : n;
        const int at = base + i * tokens;
        float now = wanted[at];
        #pragma unroll
        for (int j = 0; j < BLOCK; ++j) now -= own[(head * BLOCK + i) * BLOCK + j] * changes[j];
        float bin = now / s * (BINS / (2 * REACH)) + BINS / 2;
        bin = bin < 0 ? 0 : bin > BINS - 1 ? BINS - 1 : bin;
        int code = code_of_bin[int(bin)];
        float left = s * levels[code] - unit[at];
        changes[i] = left - error[at];
        codes[at] = code;
        errors[at] = left;
    }
"""

_log = logging.getLogger(__name__)


def round_block(
    wanted: mx.array, unit: mx.array, error: mx.array, own: mx.array, scale: mx.array, bits: int, step: int
) -> tuple[mx.array, mx.array]:
    """See ``rounding.round_block``."""
    heads, block, tokens = wanted.shape
    codes, errors = _kernel(block, step < 0)(
        inputs=[
            wanted,
            unit,
            error,
            own,
            scale,
            mx.array(lloyd_max(bits).levels),
            mx.array(rounding.code_of_bin(bits)),
            mx.array([heads, tokens], mx.int32),
        ],
        grid=(-(-heads * tokens // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[wanted.shape, wanted.shape],
        output_dtypes=[mx.uint8, mx.float32],
    )
    return codes, errors


@functools.cache
def usable() -> bool:
    """Whether the kernel runs here and rounds as NumPy does, tried once."""
    random = np.random.default_rng(0)
    shape = (2, rounding.BLOCK, 300)
    wanted, unit, error = (random.normal(size=shape).astype(np.float32) for _ in range(3))
    own = 0.1 * random.normal(size=(2, rounding.BLOCK, rounding.BLOCK)).astype(np.float32)
    scale = np.ones((2, 300), np.float32)
    expected, _ = rounding.round_block(np, wanted, unit, error, own, scale, 4, 1)
    try:
        first, second, third = (mx.array(x) for x in (wanted, unit, error))
        found, _ = round_block(first, second, third, mx.array(own), mx.array(scale), 4, 1)
        agreement = float((np.array(found) == expected).mean())
    except (RuntimeError, ValueError) as failed:
        _log.warning("the rounding kernel doesn't run on this device, so MLX's operations are used: %s", failed)
        return False
    if agreement < LEAST_AGREEMENT:
        _log.warning("the rounding kernel is wrong on this device, so MLX's operations are used")
    return agreement >= LEAST_AGREEMENT


def text(vector: str, block: int, down: bool) -> str:
    """The kernel's body with its constants, ``vector`` being the expression for the number of a thread's vector."""
    constants = {"VECTOR": vector, "BLOCK": block, "DOWN": int(down)}
    constants |= {"BINS": rounding.BINS, "REACH": f"{rounding.REACH}f"}
    body = SOURCE
    for name, value in constants.items():
        body = body.replace(name, str(value))
    return body


@functools.cache
def _kernel(block: int, down: bool) -> Any:
    name = f"round_block_{block}_{int(down)}"
    if mx.metal.is_available():
        return mx.fast.metal_kernel(name, INPUTS, OUTPUTS, text("int(thread_position_in_grid.x)", block, down))
    body = text("int(blockIdx.x * blockDim.x + threadIdx.x)", block, down)
    return mx.fast.cuda_kernel(name, INPUTS, OUTPUTS, body)
