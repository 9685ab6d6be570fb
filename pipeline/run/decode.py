"""Decoding: many queries, on one prefix or several, decoded together by mlx-lm's BatchGenerator.

Every row is a fork of its prefix. The samples of a row depend on its own seed, never on the rows beside it.
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
    """One query to decode: its prefix, the tokens behind it (at least one), its settings, and a name for its seed."""

    prefix: Prefix
    tokens: list[int]
    settings: Settings
    name: str


def generate_answers(
    loaded: LoadedModel,
    requests: Sequence[Request],
    parser: OutputParser,
    batch_size: int,
    on_answer: Callable[[], None] = lambda: None,
    ranks: RankGroup = SINGLE,
) -> list[Answer]:
    """Decode all requests and return their answers in the same order.

    batch_size: rows decoded together; a row joins as another leaves. on_answer: called for each finished answer.
    ranks: the processes that hold the model together; all of them call this at the same time.
    """
    rows = [parser.start_row(request.tokens, request.settings) for request in requests]
    samplers = [make_sampler(request.settings, request.name) for request in requests]
    with enabled(loaded.model):
        generator = BatchGenerator(
            loaded.model,
            stop_tokens=[[token] for token in sorted(loaded.tokenizer.eos_token_ids)],
            sampler=ranks.first_ranks_sampler(greedy_sampler),
            completion_batch_size=batch_size,
            prefill_batch_size=batch_size,
        )
        try:
            uids = generator.insert(
                [list(request.tokens) for request in requests],
                max_tokens=[request.settings.max_tokens for request in requests],
                caches=[request.prefix.fork() for request in requests],
                samplers=[sampler and ranks.first_ranks_sampler(sampler) for sampler in samplers],
                logits_processors=[[row.constraint] if row.constraint else [] for row in rows],
            )
            row_by_uid = dict(zip(uids, rows, strict=True))
            answers: dict[int, Answer] = {}
            while len(answers) < len(uids):
                for response in generator.next_generated():
                    uid, reason = response.uid, response.finish_reason
                    if reason != "stop" and row_by_uid[uid].add(response.token):
                        if reason is None:
                            with mx.stream(generator.stream):
                                generator.remove([uid])
                        reason = "stop"
                    if reason is not None:
                        answers[uid] = row_by_uid[uid].answer(reason)
                        on_answer()
            ranks.synchronize(generator.stream)  # a step that no row needs may still be running
            return [answers[uid] for uid in uids]
        finally:
            wait_on_gpu(generator.stream)
            generator.close()


def row_name(document_id: str, query_id: str) -> str:
    """Return the name of a row, from which the seed of its samples is made."""
    return f"{document_id}\0{query_id}"


def make_sampler(settings: Settings, name: str) -> Sampler | None:
    """Return a sampler of the next token from log-probabilities (1, vocabulary), or None for greedy decoding.

    BatchGenerator decodes all greedy rows at once. name: of the row; it is mixed with the seed.
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
