"""Squared attention of sampled queries on a GPU, from scores that are read twice, CUDA or Metal, from one text.

It computes what the elementwise operations of quant/query_stats.py do. Its text is ``sample_sums.h`` and
``sample_squares.h`` in ``text/``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from turboquant.kernels.kernel_text import Launch
from turboquant.kernels.launch import launch, runs
from turboquant.kernels.programs import Variant, variant_of
from turboquant.quant.query_stats import NEAR
from turboquant.runtime.device import on_cpu

THREADS = 256
LARGEST_ERROR = 1e-3
_TRIED = (2, 6, 3, 700)  # heads, rows, samples and tokens


def usable() -> bool:
    """Return whether there is a GPU, and the kernels find what NumPy does on it."""
    return not on_cpu() and _runs()


def squared_attention(
    scores: mx.array, positions: Sequence[int], past: mx.array | None, sinks: int
) -> tuple[mx.array, mx.array]:
    """Sum up the squared attention of queries to distant tokens.

    scores: (H, R, T) float32, of R = repeats * N queries a KV head. positions: of the N queries, all below T; a query
    sees the tokens up to its own. past: (H, R), the log-sum-exp of each query's scores of earlier tokens, or None.
    sinks: tokens that do not count, nor do those fewer than NEAR before a query.
    Returns the sums over tokens, (H, R), and those over queries, (H, T).
    """
    heads, rows, tokens = scores.shape
    groups = -(-tokens // THREADS)
    where = mx.array(list(positions), mx.int32)
    sizes = mx.array([rows, tokens, len(positions), sinks, NEAR, groups * (THREADS // 32)], mx.int32)
    (sums,) = launch(_sums_launch(heads, rows), [scores, where, sizes])
    if past is not None:
        sums = mx.logaddexp(sums, past)
    by_query, by_token = launch(_squares_launch(heads, rows, tokens), [scores, where, sums, sizes])
    return by_query.sum(axis=1), by_token


def variants() -> list[Variant | None]:
    """Return the kernels as they are compiled for CUDA."""
    of_scores, whole, of_sums = (mx.float32, 3), (mx.int32, 1), (mx.float32, 2)
    return [
        variant_of(_sums_launch(1, 1), [of_scores, whole, whole]),
        variant_of(_squares_launch(1, 1, 1), [of_scores, whole, of_sums, whole]),
    ]


def _sums_launch(heads: int, rows: int) -> Launch:
    return Launch(
        "sample_sums",
        (("THREADS", THREADS),),
        ("scores", "positions", "sizes"),
        (("sums", (heads, rows), mx.float32),),
        (rows, heads, 1),
        THREADS,
    )


def _squares_launch(heads: int, rows: int, tokens: int) -> Launch:
    groups = -(-tokens // THREADS)
    return Launch(
        "sample_squares",
        (("THREADS", THREADS),),
        ("scores", "positions", "sums", "sizes"),
        (
            ("by_query", (heads, groups * (THREADS // 32), rows), mx.float32),
            ("by_token", (heads, tokens), mx.float32),
        ),
        (groups, heads, 1),
        THREADS,
    )


@functools.cache
def _runs() -> bool:
    """Try the kernels once."""
    heads, rows, samples, tokens = _TRIED
    random = np.random.default_rng(0)
    scores = random.normal(size=(heads, rows, tokens)) * 3
    positions = [tokens // 3, tokens // 2, tokens - 1]
    past = random.normal(size=(heads, rows)) + 4

    def error() -> float:
        at = np.array(positions * (rows // samples))[:, None]
        exponentials = np.where(np.arange(tokens) <= at, np.exp(scores), 0.0)
        shares = exponentials / (exponentials.sum(axis=-1, keepdims=True) + np.exp(past)[..., None])
        squares = np.where((np.arange(tokens) <= at - NEAR) & (np.arange(tokens) >= 4), shares**2, 0.0)
        found = squared_attention(
            mx.array(scores.astype(np.float32)), positions, mx.array(past.astype(np.float32)), sinks=4
        )
        expected = squares.sum(axis=2), squares.sum(axis=1)
        offs = (np.linalg.norm(np.array(x) - y) / np.linalg.norm(y) for x, y in zip(found, expected, strict=True))
        return max(map(float, offs))

    return runs("query statistics kernels", error, LARGEST_ERROR)
