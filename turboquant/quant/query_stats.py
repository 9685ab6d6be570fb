"""What the queries of a context's own prefill tell of the ones to come: where they look, and at which tokens.

Collected while a context is prefilled in full precision, used once when it is encoded. The questions are not known
then, but the context's own later tokens ask much as they will. Knows tensors, and nothing of codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant.runtime.device import array_module, to_module
from turboquant.runtime.threads import run_in_parallel

SAMPLES = 256  # queries of each head whose attention is looked at
NEAR = 64  # tokens before a query that don't count as looked at: near ones are, whatever they hold
SINKS = 4  # nor do the first ones
SCORES, GPU_SCORES = 1 << 17, 1 << 24  # held at a time: about a core's cache
FEWEST_ROWS = 8  # however many tokens


@dataclass(frozen=True)
class QueryStatistics:
    """Queries of one layer, after positional encoding.

    moment: (n_kv_heads, head_dim, head_dim) float32, the sum of q q' over all queries that share a KV head.
    sampled: (n_heads, N, head_dim), spread evenly over the context.
    positions: N of them, ascending, counted from the first of the keys that are looked at.
    scale: of the scores.
    past: (n_heads, N) float32, the log-sum-exp of each sampled query's scores of tokens before those keys, if any.
    """

    moment: mx.array
    sampled: mx.array
    positions: tuple[int, ...]
    scale: float
    past: mx.array | None = None

    def look_at(self, keys: mx.array) -> tuple[Any, Any]:
        """Where queries look among keys (n_kv_heads, T, head_dim).

        Returns the metric in which keys should be close, (n_kv_heads, head_dim, head_dim), half of it from all
        queries, half from the sampled ones by how sharply they look at tokens far from them; and how much each
        token is looked at, (n_kv_heads, T), summed squares of attention. Both are of ``device.array_module``.
        """
        xp, heads = array_module(), keys.shape[0]
        sampled = to_module(xp, self.sampled).reshape(heads, -1, *self.sampled.shape[1:])
        past = None if self.past is None else to_module(xp, self.past).reshape(*sampled.shape[:3], 1)
        turned = to_module(xp, keys).swapaxes(-1, -2)

        def look(some: slice) -> tuple[Any, Any]:
            before = None if past is None else past[some]
            return _look_at(xp, sampled[some] * self.scale, turned[some], before, self.positions)

        each = [slice(head, head + 1) for head in range(heads)] if xp is np else [slice(None)]
        sharp, looks = zip(*run_in_parallel(look, each), strict=True)
        moment = np.array(self.moment, np.float64) if xp is np else self.moment
        # A metric's size does not matter, so the samples' may be scaled.
        return _normalised(xp, moment) + _normalised(xp, xp.concatenate(sharp)), xp.concatenate(looks)


class QueryCollector:
    """Gathers ``QueryStatistics`` chunk by chunk over a context of ``tokens`` tokens."""

    def __init__(self, tokens: int) -> None:
        self._stride = max(1, tokens // SAMPLES)
        self._moment: mx.array | None = None
        self._sampled: list[mx.array] = []
        self._positions: list[int] = []
        self._past: list[mx.array] = []
        self._scale = 1.0

    def add(self, queries: mx.array, n_kv_heads: int, offset: int, scale: float, past: mx.array | None = None) -> None:
        """Take in queries (1, n_heads, L, head_dim) at positions offset .. offset + L.

        past: (1, n_heads, L), the log-sum-exp of their scores of tokens before position 0, where there are any.
        """
        flat = queries[0].astype(mx.float32).reshape(n_kv_heads, -1, queries.shape[-1])
        moment = flat.swapaxes(1, 2) @ flat
        self._moment = moment if self._moment is None else self._moment + moment
        first = -(offset + 1) % self._stride
        self._sampled.append(mx.contiguous(queries[0, :, first :: self._stride]))  # a view would keep all of them
        self._positions += range(offset + first, offset + queries.shape[2], self._stride)
        if past is not None:
            self._past.append(mx.contiguous(past[0, :, first :: self._stride]))
        self._scale = scale
        # Neither waited for, nor are all queries kept until it is needed.
        mx.async_eval(self._moment, self._sampled[-1])  # type: ignore[no-untyped-call]

    def collected(self) -> QueryStatistics | None:
        """What was gathered; None before anything was."""
        if self._moment is None or not self._positions:
            return None
        sampled = mx.concatenate(self._sampled, axis=1)
        past = mx.concatenate(self._past, axis=1) if self._past else None
        return QueryStatistics(self._moment, sampled, tuple(self._positions), self._scale, past)


def _look_at(xp: Any, sampled: Any, turned: Any, past: Any, positions: Sequence[int]) -> tuple[Any, Any]:
    """The moments (H, dim, dim) of sampled queries, each as much as it looks sharply, and the looks (H, T).

    sampled: (H, repeats, N, dim), times the scale. turned: (H, dim, T). past: (H, repeats, N, 1) or None.
    """
    heads, repeats, count, dim = sampled.shape
    tokens = turned.shape[-1]
    sharp, looks = xp.zeros((heads, dim, dim)), xp.zeros((heads, tokens), dtype=xp.float32)
    most = SCORES if xp is np else GPU_SCORES
    step = max(FEWEST_ROWS, most // (heads * repeats * tokens))
    seen, exponentials, squared = _elementwise(xp)
    sinks = xp.array(SINKS if past is None else 0)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        stop = positions[rows][-1] + 1  # later tokens are seen by none of these
        position, token = xp.array(positions[rows])[:, None], xp.arange(stop)
        queries = sampled[:, :, rows].reshape(heads, -1, dim)
        scores = (queries @ turned[..., :stop]).reshape(heads, repeats, -1, stop)
        scores = seen(scores, token, position)
        highest = scores.max(axis=-1, keepdims=True)
        if past is not None:
            highest = xp.maximum(highest, past[:, :, rows])
        weights = exponentials(scores, highest)
        total = weights.sum(axis=-1, keepdims=True)
        if past is not None:
            total = total + exponentials(past[:, :, rows], highest)
        squares = squared(weights, total, token, position, sinks)
        weighted = queries * xp.sqrt(squares.sum(axis=-1).reshape(heads, -1, 1))
        sharp = sharp + weighted.swapaxes(-1, -2) @ weighted  # of one array with itself, so symmetric however rounded
        looks[:, :stop] += squares.sum(axis=(1, 2))
    return sharp, looks


@functools.cache
def _elementwise(xp: Any) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Scores of the tokens a query sees; exponentials; and squared shares of attention of those far from it."""

    def seen(scores: Any, token: Any, position: Any) -> Any:
        return xp.where(token <= position, scores, -1e30)

    def exponentials(scores: Any, highest: Any) -> Any:
        return xp.exp(scores - highest)

    def squared(weights: Any, total: Any, token: Any, position: Any, sinks: Any) -> Any:
        shares = weights / total
        return xp.where((token <= position - NEAR) & (token >= sinks), shares * shares, 0.0)

    if xp is np:
        return seen, exponentials, squared
    first, second, third = (mx.compile(f, shapeless=True) for f in (seen, exponentials, squared))
    return first, second, third


def _normalised(xp: Any, moments: Any) -> Any:
    """(H, dim, dim) each with a trace of 1, where it has any."""
    trace = xp.trace(moments, axis1=1, axis2=2)[:, None, None]
    return moments / xp.where(trace > 0, trace, 1.0)
