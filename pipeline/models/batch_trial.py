"""Try which rows a model can decode together: mlx-lm's batches change the answers of some architectures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from pipeline.models.row_generator import Row, RowGenerator
from turboquant import CacheCodec, Prefix, enabled, prefill
from turboquant.mlx_lm.cpu_functions import numpy_functions
from turboquant.mlx_lm.families import Batching, explain, known_batching
from turboquant.runtime.device import on_cpu

CONTEXT = 24  # tokens of the prefix
STEPS = (2, 4, 3)  # tokens that each row is given after its suffix, so that rows leave at different times
EQUAL, UNEQUAL = (5, 5, 5), (2, 6, 4)  # tokens of the rows' suffixes
# Differences of log-probabilities, in parts of their standard deviation. Of mlx-lm's architectures in float32, those
# that are right differ by 1e-5 at most and the others by 0.02 or more. A GPU computes in half precision.
CPU_TOLERANCE, GPU_TOLERANCE = 1e-3, 0.1


def find_batching(model: Any, vocabulary: int) -> Batching:
    """Return which rows of a model may be decoded together, by what is known of its architecture and by a trial.

    vocabulary: how many token ids the model knows.

    A model is not tried if all its layers are compressed: attention over compressed layers is ours, and a test holds it
    to be right in batches. Raises what the model raises if it cannot run here.
    """
    known = known_batching(model)
    if known != "together" or explain(model).status == "compressed":
        return known
    return try_batching(model, vocabulary)


def try_batching(model: Any, vocabulary: int) -> Batching:
    """Decode three short rows alone and together, and return which rows have the same log-probabilities in a batch."""
    with enabled(model), numpy_functions(model):
        prefix = prefill(model, _some_tokens(CONTEXT, 0, vocabulary), CacheCodec())
        if not _same(model, prefix, EQUAL, len(EQUAL), vocabulary):
            return "one by one"
        # With two rows at a time, suffixes are padded on the right and then on the left, and the third row joins.
        return "together" if _same(model, prefix, UNEQUAL, 2, vocabulary) else "equal lengths"


def _same(model: Any, prefix: Prefix, lengths: Sequence[int], batch_size: int, vocabulary: int) -> bool:
    """Return whether rows with suffixes of these lengths have the same log-probabilities alone and in a batch."""
    rows = [
        (_some_tokens(n, 1 + row, vocabulary), _some_tokens(9, 11 + row, vocabulary)) for row, n in enumerate(lengths)
    ]

    def logprobs(batching: Batching) -> list[mx.array]:
        given = [
            Row(prefix, suffix, steps, _forced(answer)) for (suffix, answer), steps in zip(rows, STEPS, strict=True)
        ]
        found: list[list[mx.array]] = [[] for _ in given]
        with RowGenerator(model, batching, given, batch_size) as generator:
            while responses := generator.next_generated():
                for response in responses:
                    found[response.row].append(response.logprobs.astype(mx.float32))
        return [mx.stack(each) for each in found]

    alone = logprobs("one by one")
    mx.eval(alone)
    try:
        together = logprobs("together")
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    return distance(alone, together) <= (CPU_TOLERANCE if on_cpu() else GPU_TOLERANCE)  # NaN is not


def distance(some: Sequence[mx.array], others: Sequence[mx.array]) -> float:
    """Return the largest root mean square difference of log-probabilities, in parts of their standard deviation.

    Each array is (tokens, vocabulary).
    """
    largest = []
    for a, b in zip(some, others, strict=True):
        a, b = (mx.where(mx.isinf(x), 0, x) for x in (a, b))  # some models forbid a token with minus infinity
        largest.append((mx.sqrt(mx.square(a - b).mean(axis=-1)) / mx.maximum(mx.std(a, axis=-1), 1e-6)).max())
    return float(mx.max(mx.stack(largest)))


def _some_tokens(count: int, seed: int, vocabulary: int) -> list[int]:
    return [(7919 * seed + 31 * index * index + 17 * index) % vocabulary for index in range(count)]


def _forced(tokens: Sequence[int]) -> Callable[[mx.array], mx.array]:
    """Return a sampler that chooses these tokens, one after the other."""
    left = iter(tokens)
    return lambda _: mx.array([next(left)])
