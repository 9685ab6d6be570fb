"""Decoding: many queries, on one prefix or several, decoded together by mlx-lm's BatchGenerator.

Every row is a fork of its prefix. The samples of a row depend on its own seed, never on the rows beside it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from pipeline.execution.evidence import Evidence, Turn
from pipeline.job.job import Settings
from pipeline.models.choices import probabilities
from pipeline.models.loading import LoadedModel
from pipeline.models.mlx_lm_internals import apply_top_p, greedy_sampler
from pipeline.models.normalise import normalised
from pipeline.models.output_parser import Answer, ChoiceParser, OutputParser, RowParser
from pipeline.models.quotations import QUOTATION_TOKENS, Passages
from pipeline.models.ranks import SINGLE, RankGroup
from pipeline.models.row_generator import Response, Row, RowGenerator, Sampler
from turboquant import Prefix, enabled
from turboquant.mlx_lm.cpu_functions import logsumexp, numpy_functions


@dataclass(frozen=True)
class Request:
    """One query to decode: its prefix, the tokens behind it (at least one), its settings, and a name for its seed.

    passages: the texts that evidence is quoted from; None if the query wants no evidence.
    """

    prefix: Prefix
    tokens: list[int]
    settings: Settings
    name: str
    passages: Passages | None = None


def generate_answers(
    loaded: LoadedModel,
    requests: Sequence[Request],
    parser: OutputParser,
    batch_size: int,
    on_answer: Callable[[], None] = lambda: None,
    ranks: RankGroup = SINGLE,
) -> list[Answer]:
    """Decode all requests and return their answers in the same order.

    A request is one row, or one for each of its choices or samples; its evidence is decoded when all answers are there.
    batch_size: rows decoded together, as far as the model can; a row joins as another leaves. on_answer: called for
    each finished answer. ranks: the processes that hold the model together; all of them call this at the same time.
    """
    decoder = _Decoder(loaded, batch_size, ranks)
    rows = [_rows(request, parser) for request in requests]
    decoded = decoder.decode(rows, lambda number: on_answer() if requests[number].passages is None else None)
    answers = [_merged(request, outputs) for request, outputs in zip(requests, decoded, strict=True)]
    evidence = {
        number: Evidence(request.tokens, request.settings, answers[number], parser)
        for number, request in enumerate(requests)
        if request.passages is not None
    }
    while turns := [(number, turn) for number, each in evidence.items() for turn in each.turns if turn.is_open]:
        rows = [[_quotation_row(requests[number], turn)] for number, turn in turns]
        for (_, turn), (output,) in zip(turns, decoder.decode(rows), strict=True):
            turn.add(output)
    for number, each in evidence.items():
        answers[number] = each.answer()
        on_answer()
    return answers


@dataclass(frozen=True)
class _DecodedRow:
    """A row of the batch. tokens: behind the prefix. parser: is given the row's tokens and makes its answer."""

    prefix: Prefix
    tokens: list[int]
    max_tokens: int
    sampler: Sampler | None
    parser: RowParser | ChoiceParser


class _Decoder:
    """Decodes rows in batches with one model."""

    def __init__(self, loaded: LoadedModel, batch_size: int, ranks: RankGroup) -> None:
        self._loaded, self._batch_size, self._ranks = loaded, batch_size, ranks

    def decode(
        self, groups: Sequence[Sequence[_DecodedRow]], on_group: Callable[[int], None] = lambda number: None
    ) -> list[list[Answer]]:
        """Decode all rows together; return the answers by group. on_group: called with a finished group's number."""
        rows = [row for group in groups for row in group]
        group_of = [number for number, group in enumerate(groups) for _ in group]
        left = [len(group) for group in groups]
        ranks, loaded = self._ranks, self._loaded
        given = [
            Row(
                row.prefix,
                row.tokens,
                row.max_tokens,
                row.sampler and ranks.first_ranks_sampler(row.sampler),
                [row.parser.constraint] if row.parser.constraint else [],
            )
            for row in rows
        ]
        stop_tokens = sorted(loaded.tokenizer.eos_token_ids)
        greedy = ranks.first_ranks_sampler(greedy_sampler)
        answers: dict[int, Answer] = {}
        with (
            enabled(loaded.model),
            numpy_functions(loaded.model),
            RowGenerator(loaded.model, loaded.batching, given, self._batch_size, stop_tokens, greedy) as generator,
        ):
            while responses := generator.next_generated():
                parsers = [rows[response.row].parser for response in responses]
                for response, parser, logprob in zip(
                    responses, parsers, chosen_logprobs(responses, parsers), strict=True
                ):
                    number, reason = response.row, response.finish_reason
                    if reason != "stop" and parser.add(response.token, logprob):
                        if reason is None:
                            generator.remove(number)
                        reason = "stop"
                    if reason is not None:
                        answers[number] = parser.answer(reason)
                        left[group_of[number]] -= 1
                        if not left[group_of[number]]:
                            on_group(group_of[number])
            ranks.synchronize(generator.stream)  # a step that no row needs may still be running
        in_order = iter(range(len(rows)))
        return [[answers[next(in_order)] for _ in group] for group in groups]


def chosen_logprobs(responses: Sequence[Response], parsers: Sequence[RowParser | ChoiceParser]) -> list[float]:
    """Return the log-probability of each response's token, as the model gave it before anything was masked."""
    scores = [
        response.logprobs if parser.constraint is None else parser.constraint.logits.popleft()[0]
        for response, parser in zip(responses, parsers, strict=True)
    ]
    chosen = mx.stack([row[response.token] for row, response in zip(scores, responses, strict=True)])
    chosen = chosen.astype(mx.float32)
    # The logits of a constraint are not normalised. mlx-lm normalises the others, but half precision rounds them.
    places = [place for place, row in enumerate(scores) if parsers[place].constraint or row.dtype != mx.float32]
    if places:
        rows, of_these = mx.stack([scores[place] for place in places]), mx.array(places)
        chosen[of_these] = chosen[of_these] - logsumexp(rows.astype(mx.float32), axis=-1)
    result: Any = chosen.tolist()
    return list(result)


def _rows(request: Request, parser: OutputParser) -> list[_DecodedRow]:
    """Return the rows that one request is decoded as."""
    settings, tokens, prefix = request.settings, request.tokens, request.prefix
    if settings.choices:
        choices = [parser.start_choice(tokens, choice) for choice in settings.choices]
        return [_DecodedRow(prefix, tokens, len(choice.tokens), None, choice) for choice in choices]
    return [
        _DecodedRow(
            prefix,
            tokens,
            settings.max_tokens,
            make_sampler(settings, request.name if number == 0 else f"{request.name}\0{number}"),
            parser.start_row(tokens, settings),
        )
        for number in range(settings.samples)
    ]


def _quotation_row(request: Request, turn: Turn) -> _DecodedRow:
    assert request.passages is not None
    parser = turn.start(request.settings, request.passages)
    return _DecodedRow(request.prefix, turn.tokens, QUOTATION_TOKENS, None, parser)


def _merged(request: Request, outputs: Sequence[Answer]) -> Answer:
    """Return the answer that the outputs of a request's rows make."""
    settings = request.settings
    if settings.choices:
        shares = probabilities([(output.generated, sum(output.logprobs)) for output in outputs])
        number = int(np.argmax(shares))
        if settings.temperature > 0:
            weights = np.asarray(shares) ** (1 / settings.temperature)
            generator = np.random.default_rng(_seed(settings, request.name))
            number = int(generator.choice(len(shares), p=weights / weights.sum()))
        rounded = {choice: round(share, 6) for choice, share in zip(settings.choices, shares, strict=True)}
        return replace(outputs[number], choice_probabilities=rounded)
    if settings.samples == 1:
        return outputs[0]
    usable = [output for output in outputs if output.failure is None]
    if not usable:
        return outputs[0]
    counts = Counter(normalised(output.text) for output in usable)
    commonest, count = counts.most_common(1)[0]
    first = next(output for output in usable if normalised(output.text) == commonest)
    return replace(first, samples=[output.text for output in usable], agreement=count / len(outputs))


def row_name(document_id: str, query_id: str) -> str:
    """Return the name of a row, from which the seed of its samples is made."""
    return f"{document_id}\0{query_id}"


def make_sampler(settings: Settings, name: str) -> Sampler | None:
    """Return a sampler of the next token from log-probabilities (1, vocabulary), or None for greedy decoding.

    BatchGenerator decodes all greedy rows at once. name: of the row; it is mixed with the seed.
    """
    if settings.temperature == 0:
        return None
    key = mx.random.key(_seed(settings, name))

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        if settings.top_p < 1:
            logprobs = apply_top_p(logprobs, settings.top_p)
        return mx.random.categorical(logprobs / settings.temperature, key=now)

    return sample


def _seed(settings: Settings, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{settings.seed}\0{name}".encode()).digest()[:8], "little")
