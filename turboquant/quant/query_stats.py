"""Statistics of a context's own queries: in which directions they point, and which tokens they attend to.

They are collected while a context is prefilled in full precision, and used once, when it is encoded. Queries that come
later are not known then, but the context's own later tokens attend to it in a similar way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant.runtime.device import array_module, as_float32, traces
from turboquant.runtime.threads import run_in_parallel

SAMPLES = 256  # queries of each head whose attention is computed, at least
NEAR = 64  # this many tokens before a query are not counted, because near tokens get attention whatever they are
SINKS = 4  # this many first tokens are not counted, for the same reason
SCORES, GPU_SCORES = 1 << 17, 1 << 26  # in memory at a time; on a CPU about the size of a core's cache
FEWEST_ROWS = 8  # of scores in memory at a time, however long a row is


# Of scores, positions, the log-sum-exp of earlier tokens, the number of sinks; returns sums by query and by token.
Kernel = Callable[[mx.array, Sequence[int], mx.array | None, int], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class QueryStatistics:
    """Statistics of the queries of one layer, after positional encoding.

    moment: (n_kv_heads, head_dim, head_dim) float32, the sum of q q' over all queries that share a KV head.
    sampled: (n_heads, N, head_dim), queries that are spread evenly over the context.
    positions: of the N sampled queries, ascending, counted from the first token of the context.
    scale: by which scores are multiplied.
    past_logsumexp: (n_heads, N) float32, over each sampled query's scores of tokens before the context, if any.
    """

    moment: mx.array
    sampled: mx.array
    positions: tuple[int, ...]
    scale: float
    past_logsumexp: mx.array | None = None

    def metric_and_attention(self, keys: mx.array, kernel: Kernel | None = None) -> tuple[Any, Any]:
        """Measure how the queries attend to the context's keys (n_kv_heads, T, head_dim).

        kernel: computes squared attention on a GPU, see kernels/query_stats_gpu.py.

        Returns two arrays of ``device.array_module``. The first is the metric in which the error of keys should be
        small, (n_kv_heads, head_dim, head_dim): one half is the moment of all queries, the other that of the sampled
        ones, each weighted by the squared attention that it gives to distant tokens. The second is the squared
        attention that each token gets from the sampled queries, (n_kv_heads, T).
        """
        xp, heads = array_module(), keys.shape[0]
        sampled = as_float32(xp, self.sampled).reshape(heads, -1, *self.sampled.shape[1:])
        past = None
        if self.past_logsumexp is not None:
            past = as_float32(xp, self.past_logsumexp).reshape(*sampled.shape[:3], 1)
        transposed = as_float32(xp, keys).swapaxes(-1, -2)

        def attend_heads(some: slice) -> tuple[Any, Any]:
            before = None if past is None else past[some]
            return _attend(xp, sampled[some] * self.scale, transposed[some], before, self.positions, kernel)

        each = [slice(head, head + 1) for head in range(heads)] if xp is np else [slice(None)]
        weighted_moments, attention = zip(*run_in_parallel(attend_heads, each), strict=True)
        moment = np.array(self.moment, np.float64) if xp is np else self.moment
        # Only the direction of a metric matters, so both halves are scaled to the same size.
        return _normalised(xp, moment) + _normalised(xp, xp.concatenate(weighted_moments)), xp.concatenate(attention)


class QueryCollector:
    """Collect ``QueryStatistics`` chunk by chunk over a context of ``tokens`` tokens."""

    def __init__(self, tokens: int) -> None:
        self._stride = max(1, tokens // SAMPLES)
        self._moment: mx.array | None = None
        self._sampled: list[mx.array] = []
        self._positions: list[int] = []
        self._past: list[mx.array] = []
        self._scale = 1.0

    def add(
        self, queries: mx.array, n_kv_heads: int, offset: int, scale: float, past_logsumexp: mx.array | None = None
    ) -> None:
        """Add queries (1, n_heads, L, head_dim) at positions offset .. offset + L.

        scale: by which scores are multiplied. past_logsumexp: (1, n_heads, L) over the queries' scores of tokens before
        position 0, if there are any.
        """
        flat = queries[0].astype(mx.float32).reshape(n_kv_heads, -1, queries.shape[-1])
        moment = flat.swapaxes(1, 2) @ flat
        self._moment = moment if self._moment is None else self._moment + moment
        first = -(offset + 1) % self._stride
        # A copy, since a view would keep all queries in memory.
        self._sampled.append(mx.contiguous(queries[0, :, first :: self._stride]))
        self._positions += range(offset + first, offset + queries.shape[2], self._stride)
        if past_logsumexp is not None:
            self._past.append(mx.contiguous(past_logsumexp[0, :, first :: self._stride]))
        self._scale = scale
        # Started now and not waited for; computed later, it would keep all queries in memory until then.
        mx.async_eval(self._moment, self._sampled[-1])  # type: ignore[no-untyped-call]

    def statistics(self) -> QueryStatistics | None:
        """Return the statistics of all queries so far; None if no query was sampled yet."""
        if self._moment is None or not self._positions:
            return None
        sampled = mx.concatenate(self._sampled, axis=1)
        past = mx.concatenate(self._past, axis=1) if self._past else None
        return QueryStatistics(self._moment, sampled, tuple(self._positions), self._scale, past)


def _attend(
    xp: Any, sampled: Any, transposed: Any, past: Any, positions: Sequence[int], kernel: Kernel | None
) -> tuple[Any, Any]:
    """Compute the squared attention of sampled queries to distant tokens, some queries at a time.

    sampled: (H, repeats, N, dim), multiplied by the scale. transposed: keys (H, dim, T). past: logsumexp over earlier
    tokens (H, repeats, N, 1), or None.
    Returns the sum of q q' (H, dim, dim), each query weighted by its squared attention, and the squared attention that
    each token gets (H, T).
    """
    heads, repeats, count, dim = sampled.shape
    tokens = transposed.shape[-1]
    moments, attention = xp.zeros((heads, dim, dim)), xp.zeros((heads, tokens), dtype=xp.float32)
    most = SCORES if xp is np else GPU_SCORES
    step = max(FEWEST_ROWS, most // (heads * repeats * tokens))
    sinks = SINKS if past is None else 0
    for start in range(0, count, step):
        rows = slice(start, start + step)
        stop = positions[rows][-1] + 1  # none of these queries sees later tokens
        queries = sampled[:, :, rows].reshape(heads, -1, dim)
        scores = queries @ transposed[..., :stop]
        before = None if past is None else past[:, :, rows]
        if kernel is not None:
            flat = None if before is None else before.reshape(heads, -1)
            by_query, by_token = kernel(scores, positions[rows], flat, sinks)
        else:
            by_query, by_token = _squared_attention(
                xp, scores.reshape(heads, repeats, -1, stop), positions[rows], before, sinks
            )
        weighted = queries * xp.sqrt(by_query.reshape(heads, -1, 1))
        moments = moments + weighted.swapaxes(-1, -2) @ weighted  # exactly symmetric, as both factors are one array
        attention[:, :stop] += by_token
    return moments, attention


def _squared_attention(xp: Any, scores: Any, positions: Sequence[int], past: Any, sinks: int) -> tuple[Any, Any]:
    """Sum up the squared attention to distant tokens, of scores (H, repeats, N, T): over tokens, and over queries."""
    if xp is np:
        return _squared_attention_in_place(scores, positions, past, sinks)
    mask_later, exponentials, square_distant = _elementwise()
    position, token = xp.array(positions)[:, None], xp.arange(scores.shape[-1])
    scores = mask_later(scores, token, position)
    highest = scores.max(axis=-1, keepdims=True)
    if past is not None:
        highest = xp.maximum(highest, past)
    weights = exponentials(scores, highest)
    total = weights.sum(axis=-1, keepdims=True)
    if past is not None:
        total = total + exponentials(past, highest)
    squares = square_distant(weights, total, token, position, xp.array(sinks))
    return squares.sum(axis=-1), squares.sum(axis=(1, 2))


@functools.cache
def _elementwise() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return functions that mask later tokens, take exponentials, and square the attention to distant tokens."""

    def mask_later(scores: Any, token: Any, position: Any) -> Any:
        return mx.where(token <= position, scores, -1e30)

    def exponentials(scores: Any, highest: Any) -> Any:
        return mx.exp(scores - highest)

    def square_distant(weights: Any, total: Any, token: Any, position: Any, sinks: Any) -> Any:
        shares = weights / total
        return mx.where((token <= position - NEAR) & (token >= sinks), shares * shares, 0.0)

    first, second, third = (mx.compile(f, shapeless=True) for f in (mask_later, exponentials, square_distant))
    return first, second, third


def _squared_attention_in_place(scores: Any, positions: Sequence[int], past: Any, sinks: int) -> tuple[Any, Any]:
    """Do what ``_squared_attention`` does, of NumPy arrays; ``scores`` are overwritten.

    All queries see the tokens up to the first query's position, and those are distant which are NEAR before it.
    """
    position, tokens = np.array(positions)[:, None], scores.shape[-1]
    later, near = positions[0] + 1, max(0, positions[0] + 1 - NEAR)
    np.copyto(scores[..., later:], np.float32(-1e30), where=np.arange(later, tokens) > position)
    highest = scores.max(axis=-1, keepdims=True)
    if past is not None:
        highest = np.maximum(highest, past)
    scores -= highest
    weights = np.exp(scores, out=scores)
    total = weights.sum(axis=-1, keepdims=True)
    if past is not None:
        total += np.exp(past - highest)
    weights /= total
    weights *= weights
    weights[..., :sinks] = 0
    np.copyto(weights[..., near:], np.float32(0), where=np.arange(near, tokens) > position - NEAR)
    return weights.sum(axis=-1), weights.sum(axis=(1, 2))


def _normalised(xp: Any, moments: Any) -> Any:
    """Scale matrices (H, dim, dim) to a trace of 1; one with a trace of 0 stays as it is."""
    trace = traces(xp, moments)[:, None, None]
    return moments / xp.where(trace > 0, trace, 1.0)
