"""Answers: many queries on one prefix, decoded together by mlx-lm's BatchGenerator.

Knows a loaded model, a prefix and tokens; not documents, files or what becomes of an answer. Every row is a fork of
the one prefix. A row's samples depend on its own seed alone, never on the rows beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import apply_top_p

from pipeline.job import Settings
from pipeline.model import LoadedModel
from turboquant import Prefix, enabled

Sampler = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Request:
    """One query: the tokens behind the prefix, at least one; its settings; and a name that its seed is mixed with."""

    tokens: list[int]
    settings: Settings
    name: str


@dataclass(frozen=True)
class Answer:
    """``finish_reason`` is ``stop`` or ``length``; ``tokens`` counts those generated, without the stop token."""

    text: str
    finish_reason: str
    tokens: int


def answer(
    loaded: LoadedModel,
    prefix: Prefix,
    requests: Sequence[Request],
    batch_size: int,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Answer all requests, ``batch_size`` rows at a time, rows joining as others leave; in the requests' order."""
    with enabled(loaded.model):
        generator = BatchGenerator(
            loaded.model,
            stop_tokens=[[token] for token in sorted(loaded.tokenizer.eos_token_ids)],
            completion_batch_size=batch_size,
            prefill_batch_size=batch_size,
        )
        try:
            return _generate(generator, loaded.tokenizer, prefix, requests, on_answer)
        finally:
            generator.close()


def _generate(
    generator: BatchGenerator,
    tokenizer: Any,
    prefix: Prefix,
    requests: Sequence[Request],
    on_answer: Callable[[], None],
) -> list[Answer]:
    numbers = generator.insert(
        [list(request.tokens) for request in requests],
        max_tokens=[request.settings.max_tokens for request in requests],
        caches=[prefix.fork() for _ in requests],
        samplers=[_sampler(request) for request in requests],
    )
    generated: dict[int, list[int]] = {number: [] for number in numbers}
    answers: dict[int, Answer] = {}
    while len(answers) < len(numbers):
        for response in generator.next_generated():
            tokens = generated[response.uid]
            if response.finish_reason != "stop":
                tokens.append(response.token)
            if response.finish_reason is not None:
                text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                answers[response.uid] = Answer(text, response.finish_reason, len(tokens))
                on_answer()
    return [answers[number] for number in numbers]


def _sampler(request: Request) -> Sampler | None:
    """None for greedy decoding, which BatchGenerator then does for all rows at once."""
    settings = request.settings
    if settings.temperature == 0:
        return None
    seed = hashlib.sha256(f"{settings.seed}\0{request.name}".encode()).digest()
    key = mx.random.key(int.from_bytes(seed[:8], "little"))

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        if settings.top_p < 1:
            logprobs = apply_top_p(logprobs, settings.top_p)
        return mx.random.categorical(logprobs / settings.temperature, key=now)

    return sample
