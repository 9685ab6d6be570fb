"""Turn generated tokens into an answer: where the thinking ends, where the answer ends, and its text."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import AnswerCutOff, GenerationFailed, RowError
from pipeline.job.job import Settings
from pipeline.models.channels import ChannelMarks, ChannelParser
from pipeline.models.choices import ForcedTokens, choice_tokens
from pipeline.models.constraints import Constraint, Grammars, check_json
from pipeline.models.quotations import QUOTATION_TOKENS, Passages, turn_tokens
from pipeline.models.thinking import ThinkingMarks, ThinkingParser

_MARGIN = 8  # tokens before a stop string; the first of them may be a part of a character


@dataclass(frozen=True)
class Answer:
    """The answer of one row.

    text: ends before the first stop string, if the model wrote one. finish_reason: `stop` or `length`. tokens: how many
    were generated, without the stop token. thinking: the text of the thinking, if the settings keep it. failure: the
    reason why the answer is of no use, or None. generated: the tokens themselves. logprobs: of those that belong to the
    answer, as the model gave them before masks, temperature and top_p. choice_probabilities, samples, agreement: of
    queries that ask for them. quotes: evidence, if the query asks for it.
    """

    text: str
    finish_reason: str
    tokens: int
    thinking: str | None = None
    failure: RowError | None = None
    generated: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    choice_probabilities: Mapping[str, float] | None = None
    samples: Sequence[str] | None = None
    agreement: float | None = None
    quotes: Sequence[str] | None = None


class OutputParser:
    """Parses the output of one model.

    tokenizer: mlx-lm's wrapper. schemas: the JSON schemas that answers may have to follow. Raises ModelError if the
    tokenizer cannot hold answers to a schema.

    turn_tokens: returns the tokens with which the user asks a further question behind an answer.
    """

    def __init__(self, tokenizer: Any, schemas: Collection[str] = ()) -> None:
        channels = ChannelMarks(tokenizer)
        self._tokenizer, self._marks = tokenizer, channels if channels.exist else ThinkingMarks(tokenizer)
        self._grammars = Grammars(tokenizer, schemas)
        self.turn_tokens = functools.cache(lambda question: turn_tokens(tokenizer, question))

    def start_row(self, prompt: Sequence[int], settings: Settings) -> RowParser:
        """Return the parser of the answer to one prompt, of which the last tokens are enough."""
        constraint = None
        if settings.json_schema is not None:
            # A parser of the constraint's own: mlx-lm shows a token to the constraint before the row is given it.
            thinking = self._marks.parser(prompt, may_think=bool(settings.thinking))
            constraint = self._grammars.constraint(settings.json_schema, thinking)
        return RowParser(self._tokenizer, self._marks.parser(prompt), settings, constraint)

    def start_choice(self, prompt: Sequence[int], choice: str) -> ChoiceParser:
        """Return the parser of a row that writes one choice, in order to score it."""
        return ChoiceParser(choice, choice_tokens(self._tokenizer, prompt, choice))

    def start_quotation(self, prompt: Sequence[int], settings: Settings, passages: Passages) -> RowParser:
        """Return the parser of a turn in which the model quotes from passages."""
        constraint = self._grammars.quotation(passages, self._marks.parser(prompt, may_think=False))
        own = replace(settings, max_tokens=QUOTATION_TOKENS, temperature=0.0, json_schema=None, thinking=False)
        return RowParser(self._tokenizer, self._marks.parser(prompt), own, constraint)


class RowParser:
    """The tokens of one row so far. `constraint` holds the row to its JSON schema or to passages, if there are any."""

    def __init__(
        self,
        tokenizer: Any,
        thinking: ThinkingParser | ChannelParser,
        settings: Settings,
        constraint: Constraint | None,
    ) -> None:
        from pipeline.models.mlx_lm_internals import special_token_ids, tool_call_marks

        self._tokenizer, self._thinking, self._settings = tokenizer, thinking, settings
        self.constraint = constraint
        self._answer_tokens: list[int] = []
        self._generated: list[int] = []
        self._logprobs: list[float] = []  # of the answer's tokens
        self._held_back: list[float] = []  # of tokens after them, which may belong to the answer too
        self._tool_calls = tool_call_marks(tokenizer)
        special = special_token_ids(tokenizer) if settings.stop else {}
        # Decoding leaves special tokens out, so a stop string with one of their texts is looked for with them.
        self._special = special if any(text in stop for text in special.values() for stop in settings.stop) else {}

    def add(self, token: int, logprob: float) -> bool:
        """Add a generated token and its log-probability; return whether the answer ends with it."""
        self._generated.append(token)
        self._held_back.append(logprob)
        if known := self._thinking.add(token):
            self._answer_tokens += known
            self._logprobs += self._held_back[-len(known) :]
            self._held_back.clear()
        if self.constraint is not None:
            return self.constraint.is_complete
        if not self._settings.stop:
            return False
        # Few tokens are decoded at every step: each of them has at least one byte of the stop string.
        window = max(len(stop.encode()) for stop in self._settings.stop) + _MARGIN
        # The beginning of the window may decode to another text than it does as a part of the whole answer.
        return self._before_stop(self._answer_tokens[-window:])[1] and self._before_stop(self._answer_tokens)[1]

    def answer(self, finish_reason: str) -> Answer:
        """Return the answer that the tokens make, after generation has ended for `finish_reason`."""
        count = len(self._thinking.tokens) + len(self._answer_tokens)
        thinking = (self._thinking.text() or None) if self._settings.thinking == "keep" else None
        if self._thinking.is_open:
            cut_off = AnswerCutOff(f"the model had not ended its thinking after {count:,} tokens; raise max_tokens")
            return Answer("", finish_reason, count, thinking, cut_off)
        if any(map(math.isnan, self._logprobs)):
            failure = GenerationFailed("the model computed probabilities that are not numbers")
            return Answer("", finish_reason, count, thinking, failure)
        if self.constraint is not None:
            text, incomplete = self.constraint.text(self._answer_tokens), self.constraint.failure(count)
            if incomplete is None and self._settings.json_schema is not None:
                incomplete = check_json(text)
            return Answer(text, finish_reason, count, thinking, incomplete, self._generated, self._logprobs)
        kept = self._outside_tool_calls()
        tokens, logprobs = [self._answer_tokens[place] for place in kept], [self._logprobs[place] for place in kept]
        text, has_stop = self._before_stop(tokens)
        if len(kept) < len(self._answer_tokens) and not text.strip():
            called = GenerationFailed("the model called a tool in place of an answer", may_pass=False)
            return Answer("", finish_reason, count, thinking, called)
        reason = "stop" if has_stop else finish_reason
        return Answer(text.strip(), reason, count, thinking, None, self._generated, logprobs)

    def _outside_tool_calls(self) -> list[int]:
        """Return the places of the answer's tokens that do not belong to the call of a tool."""
        (start, end), tokens, kept, position = self._tool_calls, self._answer_tokens, list[int](), 0
        while start and (begin := _find(tokens, start, position)) >= 0:
            kept += range(position, begin)
            stop = _find(tokens, end, begin + len(start)) if end else -1
            position = stop + len(end) if stop >= 0 else len(tokens)
        return [*kept, *range(position, len(tokens))]

    def _before_stop(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Return the text before the first stop string, and whether there is one."""
        pieces = self._pieces(tokens)
        text = "".join(piece for piece, _ in pieces)
        starts = [start for stop in self._settings.stop if (start := text.find(stop)) >= 0]
        end, answer = min(starts, default=len(text)), ""
        for piece, is_special in pieces:
            answer += "" if is_special else piece[: max(end, 0)]
            end -= len(piece)
        return answer, bool(starts)

    def _pieces(self, tokens: Sequence[int]) -> list[tuple[str, bool]]:
        """Return the text of tokens in pieces, and whether each is that of a special token in which a stop may be."""
        pieces: list[tuple[str, bool]] = []
        start = 0
        for index, token in enumerate([*tokens, None]):
            if token is None or token in self._special:
                pieces.append((self._tokenizer.decode(tokens[start:index], skip_special_tokens=True), False))
                start = index + 1
                if token is not None:
                    pieces.append((self._special[token], True))
        return pieces


class ChoiceParser:
    """A row that writes one choice of a query. `constraint` lets it write nothing else."""

    def __init__(self, choice: str, tokens: Sequence[int]) -> None:
        self._choice, self.tokens = choice, list(tokens)
        self.constraint = ForcedTokens(tokens)
        self._logprobs: list[float] = []

    def add(self, token: int, logprob: float) -> bool:
        """Add a token and its log-probability; return whether the choice ends with it."""
        self._logprobs.append(logprob)
        return len(self._logprobs) == len(self.tokens)

    def answer(self, finish_reason: str) -> Answer:
        """Return the choice with the log-probabilities of its tokens."""
        return Answer(self._choice, "stop", len(self.tokens), generated=self.tokens, logprobs=self._logprobs)


def _find(tokens: Sequence[int], part: Sequence[int], start: int) -> int:
    """Return where a part begins in tokens from a place on, or -1."""
    places = range(start, len(tokens) - len(part) + 1)
    return next((place for place in places if tokens[place : place + len(part)] == part), -1)
