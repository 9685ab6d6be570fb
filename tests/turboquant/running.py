"""Greedy answers through mlx-lm's own generators, and how to compare them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator

from turboquant import enabled


@dataclasses.dataclass
class Answer:
    """Greedy tokens, and the log-probabilities they were chosen by: a small model's choice may hide much."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Any] = dataclasses.field(default_factory=list)


def assert_same(answers: Sequence[Answer], others: Sequence[Answer]) -> None:
    """Equal but for the rounding of products of other shapes."""
    assert [a.tokens for a in answers] == [b.tokens for b in others]
    for a, b in zip(answers, others, strict=True):
        np.testing.assert_allclose(np.stack(a.logprobs), np.stack(b.logprobs), atol=2e-3)


def continue_on(model: Any, caches: list[Any], tokens: list[int]) -> mx.array:
    """Logits (L, vocabulary) of tokens added to a cache."""
    with enabled(model):
        logits: mx.array = model(mx.array(tokens)[None], cache=caches)[0]
        mx.eval(logits)
    return logits


def answer(
    model: Any, caches: Sequence[list[Any]], suffixes: Sequence[list[int]], lengths: Sequence[int], rows: int
) -> tuple[list[Answer], list[list[Any]]]:
    """The answer and the final cache of each request, through mlx-lm's BatchGenerator as it is."""
    with enabled(model):
        generator = BatchGenerator(model, completion_batch_size=rows, prefill_batch_size=rows)
        numbers = generator.insert([list(s) for s in suffixes], max_tokens=list(lengths), caches=list(caches))
        answers = {number: Answer() for number in numbers}
        final: dict[int, list[Any]] = {}
        while len(final) < len(numbers):
            for response in generator.next_generated():
                answers[response.uid].tokens.append(response.token)
                answers[response.uid].logprobs.append(np.array(response.logprobs))
                if response.finish_reason is not None:
                    final[response.uid] = response.prompt_cache
        generator.close()
    return [answers[number] for number in numbers], [final[number] for number in numbers]


def cosine(a: mx.array, b: mx.array) -> float:
    x, y = np.array(a, dtype=np.float64).ravel(), np.array(b, dtype=np.float64).ravel()
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def random_kv(tokens: int) -> tuple[mx.array, mx.array]:
    return mx.random.normal((1, 2, tokens, 64)), mx.random.normal((1, 2, tokens, 64))
