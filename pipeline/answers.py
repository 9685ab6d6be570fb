"""Answers: many queries, on one prefix or several, decoded together by mlx-lm's BatchGenerator.

Knows a loaded model, prefixes and tokens; not documents, files or what becomes of an answer. Every row is a fork of
its prefix. A row's samples depend on its own seed alone, never on the rows beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import apply_top_p

from pipeline.errors import RowError
from pipeline.job import Settings
from pipeline.model import LoadedModel
from pipeline.schemas import Constraint
from turboquant import Prefix, enabled

Sampler = Callable[[mx.array], mx.array]
_MARGIN = 8  # tokens before a stop string, of which the first may be half a character


@dataclass(frozen=True)
class Request:
    """One query: its prefix; the tokens behind it, at least one; settings; and a name that its seed is mixed with.

    constraint: what keeps the answer to its schema, where it has one; of use once.
    """

    prefix: Prefix
    tokens: list[int]
    settings: Settings
    name: str
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Answer:
    """``finish_reason`` is ``stop`` or ``length``; ``tokens`` counts those generated, without the stop token.

    ``text`` ends before the first of the stop strings, if one was met. Where it was to be JSON and is not, there is a
    ``failure``.
    """

    text: str
    finish_reason: str
    tokens: int
    failure: RowError | None = None


def answer(
    loaded: LoadedModel,
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
            return _generate(generator, loaded.tokenizer, requests, on_answer)
        finally:
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


def read_answer(tokens: Iterable[int], stops: Sequence[str], tokenizer: Any) -> tuple[str, int]:
    """The text that tokens make, and how many were taken: those up to the first stop string, if there is one."""
    taken: list[int] = []
    for token in tokens:
        taken.append(token)
        if stops and _ends_with_one_of(stops, taken, tokenizer):
            break
    return _cut(_decode(taken, tokenizer), stops)[0].strip(), len(taken)


class _Row:
    """A request and what has been generated for it."""

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self._stops, self._constraint = request.settings.stop, request.constraint
        self._tokenizer = tokenizer
        self._tokens: list[int] = []

    def take(self, token: int) -> bool:
        """Add a token; whether the answer ends with it."""
        self._tokens.append(token)
        if self._constraint is not None:
            return self._constraint.is_complete
        return bool(self._stops) and _ends_with_one_of(self._stops, self._tokens, self._tokenizer)

    def answer(self, reason: str) -> Answer:
        """What the tokens make, when there come no more."""
        count = len(self._tokens)
        if self._constraint is not None:
            return Answer(self._constraint.text(self._tokens), reason, count, self._constraint.failure(count))
        text, stopped = _cut(_decode(self._tokens, self._tokenizer), self._stops)
        return Answer(text.strip(), "stop" if stopped else reason, count)


def _generate(
    generator: BatchGenerator, tokenizer: Any, requests: Sequence[Request], on_answer: Callable[[], None]
) -> list[Answer]:
    numbers = generator.insert(
        [list(request.tokens) for request in requests],
        max_tokens=[request.settings.max_tokens for request in requests],
        caches=[request.prefix.fork() for request in requests],
        samplers=[make_sampler(request.settings, request.name) for request in requests],
        logits_processors=[[request.constraint] if request.constraint else [] for request in requests],
    )
    rows = {number: _Row(request, tokenizer) for number, request in zip(numbers, requests, strict=True)}
    answers: dict[int, Answer] = {}
    while len(answers) < len(numbers):
        for response in generator.next_generated():
            number, reason = response.uid, response.finish_reason
            if reason != "stop" and rows[number].take(response.token):
                if reason is None:
                    with mx.stream(generator.stream):
                        generator.remove([number])
                reason = "stop"
            if reason is not None:
                answers[number] = rows[number].answer(reason)
                on_answer()
    return [answers[number] for number in numbers]


def _decode(tokens: Sequence[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def _ends_with_one_of(stops: Sequence[str], tokens: Sequence[int], tokenizer: Any) -> bool:
    """Whether the last token completed a stop string; told from few tokens, as each has a byte of text at least."""
    window = max(len(stop.encode()) for stop in stops) + _MARGIN
    if _cut(_decode(tokens[-window:], tokenizer), stops)[1]:
        return _cut(_decode(tokens, tokenizer), stops)[1]  # the beginning of a window may not decode as it does whole
    return False


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)
