"""Answers: many queries, on one prefix or several, decoded together by mlx-lm's BatchGenerator.

Knows a loaded model, prefixes and tokens; not documents, files or what becomes of an answer. Every row is a fork of
its prefix. A row's samples depend on its own seed alone, never on the rows beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from pipeline.job.job import Settings
from pipeline.models.loading import LoadedModel
from pipeline.models.mlx_lm_internals import BatchGenerator, apply_top_p, greedy_sampler
from pipeline.models.output_parser import Answer, OutputParser
from pipeline.models.ranks import SINGLE, RankGroup
from turboquant import Prefix, enabled
from turboquant.runtime.device import wait_on_gpu

Sampler = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Request:
    """One query: its prefix; the tokens behind it, at least one; settings; and a name that its seed is mixed with."""

    prefix: Prefix
    tokens: list[int]
    settings: Settings
    name: str


def answer(
    loaded: LoadedModel,
    requests: Sequence[Request],
    reader: OutputParser,
    batch_size: int,
    on_answer: Callable[[], None] = lambda: None,
    ranks: RankGroup = SINGLE,
) -> list[Answer]:
    """Answer all requests, ``batch_size`` rows at a time, rows joining as others leave; in the requests' order.

    ranks: those that hold the model between them, and do this all at once.
    """
    with enabled(loaded.model):
        generator = BatchGenerator(
            loaded.model,
            stop_tokens=[[token] for token in sorted(loaded.tokenizer.eos_token_ids)],
            sampler=ranks.first_ranks_sampler(greedy_sampler),
            completion_batch_size=batch_size,
            prefill_batch_size=batch_size,
        )
        try:
            answers = _generate(generator, reader, requests, on_answer, ranks)
            ranks.synchronize(generator.stream)  # where a step begun for nobody is under way
            return answers
        finally:
            wait_on_gpu(generator.stream)
            generator.close()


def row_name(document_id: str, query_id: str) -> str:
    """The name of a row, of which its seed is made."""
    return f"{document_id}\0{query_id}"


def make_sampler(settings: Settings, name: str) -> Sampler | None:
    """Samples the next token of the row of that name from its log-probabilities, (1, vocabulary).

    None for greedy decoding, which BatchGenerator then does for all rows at once.
    """
    if settings.temperature == 0:
        return None
    seed = hashlib.sha256(f"{settings.seed}\0{name}".encode()).digest()
    key = mx.random.key(int.from_bytes(seed[:8], "little"))

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        if settings.top_p < 1:
            logprobs = apply_top_p(logprobs, settings.top_p)
        return mx.random.categorical(logprobs / settings.temperature, key=now)

    return sample


def _generate(
    generator: BatchGenerator,
    reader: OutputParser,
    requests: Sequence[Request],
    on_answer: Callable[[], None],
    ranks: RankGroup,
) -> list[Answer]:
    readings = [reader.start_row(request.tokens, request.settings) for request in requests]
    samplers = [make_sampler(request.settings, request.name) for request in requests]
    numbers = generator.insert(
        [list(request.tokens) for request in requests],
        max_tokens=[request.settings.max_tokens for request in requests],
        caches=[request.prefix.fork() for request in requests],
        samplers=[sampler and ranks.first_ranks_sampler(sampler) for sampler in samplers],
        logits_processors=[[reading.constraint] if reading.constraint else [] for reading in readings],
    )
    rows = dict(zip(numbers, readings, strict=True))
    answers: dict[int, Answer] = {}
    while len(answers) < len(numbers):
        for response in generator.next_generated():
            number, reason = response.uid, response.finish_reason
            if reason != "stop" and rows[number].add(response.token):
                if reason is None:
                    with mx.stream(generator.stream):
                        generator.remove([number])
                reason = "stop"
            if reason is not None:
                answers[number] = rows[number].answer(reason)
                on_answer()
    return [answers[number] for number in numbers]
