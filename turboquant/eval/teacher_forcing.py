"""Run a model over filled caches, and return its logits for tokens that are given (teacher forcing)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from turboquant.caches.prefix import feed, prefill_caches

CHUNK = 128  # how many tokens of a continuation are fed at a time


@dataclass(frozen=True)
class Context:
    """A sample's context, prefilled in full precision, from which every baseline starts.

    caches: one filled cache for each layer; baselines must copy them.
    compressible: for each layer, whether a baseline may compress it.
    chunk: how many tokens of a context are fed at a time.
    """

    model: Any
    tokens: tuple[int, ...]
    caches: list[Any]
    compressible: list[bool]
    chunk: int

    @property
    def coordinates(self) -> int:
        """How many numbers the keys and values of the context have in the compressible layers."""
        held = [cache for cache, yes in zip(self.caches, self.compressible, strict=True) if yes]
        return sum(x.size for cache in held for x in cache.keys_and_values())


def prefill_context(model: Any, tokens: Sequence[int], compressible: list[bool], chunk: int = 512) -> Context:
    """Prefill a context in full precision."""
    caches = prefill_caches(model, len(tokens), compressible)
    feed(model, caches, tokens, chunk)
    return Context(model, tuple(tokens), caches, compressible, chunk)


def extend_by_answer(context: Context, run: Sequence[int], tokens: int, stop: Collection[int]) -> list[int]:
    """Return a continuation and at most ``tokens`` tokens of the model's greedy answer to it, in full precision."""
    answered, cache, fresh = list(run), copy.deepcopy(context.caches), list(run)
    while len(answered) < len(run) + tokens:
        logits = context.model(mx.array(fresh)[None], cache=cache)[0, -1]
        fresh = [int(mx.argmax(logits))]
        if fresh[0] in stop:
            break
        answered += fresh
    return answered


def logits_of(model: Any, cache: list[Any], tokens: Sequence[int]) -> mx.array:
    """Return the logits (L, vocabulary) behind each of the L tokens of one row."""
    return _feed_tokens(model, cache, [tokens])[0]


def batch_logits(model: Any, rows: Sequence[list[Any]], runs: Sequence[Sequence[int]]) -> list[mx.array]:
    """Return the logits of each run, fed as the rows of one batch.

    Shorter runs are padded at their end, where it does not change the logits of their own tokens.
    """
    merged = [caches[0].merge(list(caches)) for caches in zip(*rows, strict=True)]
    longest = max(map(len, runs))
    logits = _feed_tokens(model, merged, [[*run, *[0] * (longest - len(run))] for run in runs])
    return [logits[row, : len(run)] for row, run in enumerate(runs)]


def _feed_tokens(model: Any, cache: list[Any], tokens: Sequence[Sequence[int]]) -> mx.array:
    """Return the logits (B, L, vocabulary) behind each of (B, L) tokens."""
    whole, parts = mx.array([list(row) for row in tokens]), []
    for start in range(0, whole.shape[1], CHUNK):
        parts.append(model(whole[:, start : start + CHUNK], cache=cache))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=1)
