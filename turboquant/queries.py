"""What the queries of a context's own prefill tell of the ones to come: where they look, and at which tokens.

Collected while a context is prefilled in full precision, used once when it is encoded. The questions are not known
then, but the context's own later tokens ask much as they will. Knows tensors, and nothing of codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.device import array_module, to_module

SAMPLES = 256  # queries of each head whose attention is looked at
NEAR = 64  # tokens before a query that don't count as looked at: near ones are, whatever they hold
SINKS = 4  # nor do the first ones
SCORES = 1 << 24  # scores held at a time


@dataclass(frozen=True)
class ContextQueries:
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

    def look_at(self, keys: mx.array) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Where queries look among keys (n_kv_heads, T, head_dim).

        Returns the metric in which keys should be close, (n_kv_heads, head_dim, head_dim), half of it from all
        queries, half from the sampled ones by how sharply they look at tokens far from them; and how much each
        token is looked at, (n_kv_heads, T), summed squares of attention.
        """
        xp = array_module()
        heads, tokens, dim = keys.shape
        repeats = self.sampled.shape[0] // heads
        sampled = to_module(xp, self.sampled).reshape(heads, repeats, -1, dim)
        past = None if self.past is None else to_module(xp, self.past).reshape(heads, repeats, -1, 1)
        turned = to_module(xp, keys).swapaxes(-1, -2)[:, None]
        position, token = xp.array(self.positions)[:, None], xp.arange(tokens)
        sharp, looks = xp.zeros((heads, dim, dim)), xp.zeros((heads, tokens))
        step = max(1, SCORES // (heads * repeats * tokens))
        for start in range(0, len(self.positions), step):
            rows = slice(start, start + step)
            seen = token <= position[rows]
            far = (token <= position[rows] - NEAR) & (token >= (SINKS if past is None else 0))
            scores = xp.where(seen, (sampled[:, :, rows] * self.scale) @ turned, -1e30)
            highest = scores.max(axis=-1, keepdims=True)
            if past is not None:
                highest = xp.maximum(highest, past[:, :, rows])
            weights = xp.exp(scores - highest)
            total = weights.sum(axis=-1, keepdims=True)
            weights = weights / (total if past is None else total + xp.exp(past[:, :, rows] - highest))
            squares = xp.where(far, weights * weights, 0.0)
            some = sampled[:, :, rows].reshape(heads, -1, dim)
            sharpness = squares.sum(axis=-1).reshape(heads, -1, 1)
            sharp = sharp + (some * sharpness).swapaxes(-1, -2) @ some
            looks = looks + squares.sum(axis=(1, 2))
            if xp is mx:
                mx.eval(sharp, looks)
        moment, sharp = np.array(self.moment, np.float64), np.array(sharp, np.float64)
        return _normalised(moment) + _normalised(sharp), np.array(looks, np.float32)


class QueryCollector:
    """Gathers ``ContextQueries`` chunk by chunk over a context of ``tokens`` tokens."""

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

    def collected(self) -> ContextQueries | None:
        """What was gathered; None before anything was."""
        if self._moment is None or not self._positions:
            return None
        sampled = mx.concatenate(self._sampled, axis=1)
        past = mx.concatenate(self._past, axis=1) if self._past else None
        return ContextQueries(self._moment, sampled, tuple(self._positions), self._scale, past)


def _normalised(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """(H, dim, dim) each with a trace of 1, where it has any."""
    trace = np.trace(moments, axis1=1, axis2=2)[:, None, None]
    normalised: NDArray[np.float64] = moments / np.where(trace > 0, trace, 1.0)
    return normalised
