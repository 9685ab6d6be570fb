"""A model run over caches: contexts in, logits out.

Knows models, caches and tokens; neither what is compressed in a cache nor what becomes of the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from turboquant.caches.prefix import feed, prefill_caches

CHUNK = 128  # tokens of a continuation fed at a time


@dataclass(frozen=True)
class Context:
    """A sample's context, prefilled in full precision, for contenders to start from.

    caches: one a layer, filled; to be copied, never used up.
    compressible: which of the layers a contender may compress.
    """

    model: Any
    tokens: tuple[int, ...]
    caches: list[Any]
    compressible: list[bool]
    chunk: int

    @property
    def coordinates(self) -> int:
        """Numbers that the compressible layers hold for the context, keys and values."""
        held = [cache for cache, yes in zip(self.caches, self.compressible, strict=True) if yes]
        return sum(x.size for cache in held for x in cache.keys_and_values())


def prefilled(model: Any, tokens: Sequence[int], compressible: list[bool], chunk: int = 512) -> Context:
    """A context in full precision."""
    caches = prefill_caches(model, len(tokens), compressible)
    feed(model, caches, tokens, chunk)
    return Context(model, tuple(tokens), caches, compressible, chunk)


def answered(context: Context, run: Sequence[int], tokens: int, stop: Collection[int]) -> list[int]:
    """A continuation and the greedy answer to it, in full precision."""
    answered, cache, fresh = list(run), copy.deepcopy(context.caches), list(run)
    while len(answered) < len(run) + tokens:
        logits = context.model(mx.array(fresh)[None], cache=cache)[0, -1]
        fresh = [int(mx.argmax(logits))]
        if fresh[0] in stop:
            break
        answered += fresh
    return answered


def logits_of(model: Any, cache: list[Any], tokens: Sequence[int]) -> mx.array:
    """The logits (L, vocabulary) behind each of L tokens, one row's."""
    return _forced(model, cache, [tokens])[0]


def batch_logits(model: Any, rows: Sequence[list[Any]], runs: Sequence[Sequence[int]]) -> list[mx.array]:
    """The logits of each run, fed as the rows of one batch. The shorter are padded behind, where it does no harm."""
    merged = [caches[0].merge(list(caches)) for caches in zip(*rows, strict=True)]
    longest = max(map(len, runs))
    logits = _forced(model, merged, [[*run, *[0] * (longest - len(run))] for run in runs])
    return [logits[row, : len(run)] for row, run in enumerate(runs)]


def _forced(model: Any, cache: list[Any], tokens: Sequence[Sequence[int]]) -> mx.array:
    """The logits (B, L, vocabulary) behind each of (B, L) tokens."""
    whole, parts = mx.array([list(row) for row in tokens]), []
    for start in range(0, whole.shape[1], CHUNK):
        parts.append(model(whole[:, start : start + CHUNK], cache=cache))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=1)
