"""Rounding a block of coordinates on a GPU: one thread a vector. What it computes is rounding.py's ``round_block``."""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np

from turboquant import rounding
from turboquant.codebook import lloyd_max
from turboquant.kernels.launch import Launch, launch, runs

THREADS = 128
INPUTS = ("wanted", "unit", "error", "own", "scale", "levels", "code_of_bin", "sizes")
MOST_DISAGREEMENT = 0.01  # of codes with NumPy's: sums are rounded otherwise, and a tie is a tie


def round_block(
    wanted: mx.array, unit: mx.array, error: mx.array, own: mx.array, scale: mx.array, bits: int, step: int
) -> tuple[mx.array, mx.array]:
    """See ``rounding.round_block``."""
    heads, block, tokens = wanted.shape
    constants = ("BLOCK", block), ("DOWN", int(step < 0)), ("THREADS", THREADS)
    what = Launch(
        "round_block",
        (*constants, ("BINS", rounding.BINS), ("REACH", rounding.REACH)),
        INPUTS,
        (("codes", wanted.shape, mx.uint8), ("errors", wanted.shape, mx.float32)),
        (-(-heads * tokens // THREADS), 1, 1),
        THREADS,
    )
    levels, codes = mx.array(lloyd_max(bits).levels), mx.array(rounding.code_of_bin(bits))
    sizes = mx.array([heads, tokens], mx.int32)
    chosen, errors = launch(what, [wanted, unit, error, own, scale, levels, codes, sizes])
    return chosen, errors


@functools.cache
def usable() -> bool:
    """Whether the kernel runs here and rounds as NumPy does, tried once."""
    random = np.random.default_rng(0)
    shape = (2, rounding.BLOCK, 300)
    wanted, unit, error = (random.normal(size=shape).astype(np.float32) for _ in range(3))
    own = 0.1 * random.normal(size=(2, rounding.BLOCK, rounding.BLOCK)).astype(np.float32)
    scale = np.ones((2, 300), np.float32)
    expected, _ = rounding.round_block(np, wanted, unit, error, own, scale, 4, 1)

    def disagreement() -> float:
        first, second, third = (mx.array(x) for x in (wanted, unit, error))
        found, _ = round_block(first, second, third, mx.array(own), mx.array(scale), 4, 1)
        return float((np.array(found) != expected).mean())

    return runs("rounding kernels", disagreement, MOST_DISAGREEMENT)
