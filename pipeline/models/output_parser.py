"""Turn generated tokens into an answer: where the thinking ends, where the answer ends, and its text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import AnswerCutOff, RowError
from pipeline.job.job import Settings
from pipeline.models.constraints import Constraint, Grammars
from pipeline.models.thinking import ThinkingMarks, ThinkingParser

_MARGIN = 8  # tokens before a stop string; the first of them may be a part of a character


@dataclass(frozen=True)
class Answer:
    """The answer of one row.

    text: ends before the first stop string, if the model wrote one. finish_reason: `stop` or `length`. tokens: how many
    were generated, without the stop token. thinking: the text of the thinking, if the settings keep it. failure: the
    reason why the answer is of no use, or None.
    """

    text: str
    finish_reason: str
    tokens: int
    thinking: str | None = None
    failure: RowError | None = None


class OutputParser:
    """Parses the output of one model.

    tokenizer: mlx-lm's wrapper. schemas: the JSON schemas that answers may have to follow. Raises ModelError if the
    tokenizer cannot hold answers to a schema.
    """

    def __init__(self, tokenizer: Any, schemas: Collection[str] = ()) -> None:
        self._tokenizer, self._marks = tokenizer, ThinkingMarks(tokenizer)
        self._grammars = Grammars(tokenizer, schemas)

    def start_row(self, prompt: Sequence[int], settings: Settings) -> RowParser:
        """Return the parser of the answer to one prompt, of which the last tokens are enough."""
        constraint = None
        if settings.json_schema is not None:
            # A parser of the constraint's own: mlx-lm shows a token to the constraint before the row is given it.
            thinking = self._marks.parser(prompt, may_think=bool(settings.thinking))
            constraint = self._grammars.constraint(settings.json_schema, thinking)
        return RowParser(self._tokenizer, self._marks, self._marks.parser(prompt), settings, constraint)


class RowParser:
    """The tokens of one row so far. `constraint` holds the row to its JSON schema, if its settings name one."""

    def __init__(
        self,
        tokenizer: Any,
        marks: ThinkingMarks,
        thinking: ThinkingParser,
        settings: Settings,
        constraint: Constraint | None,
    ) -> None:
        self._tokenizer, self._marks, self._thinking, self._settings = tokenizer, marks, thinking, settings
        self.constraint = constraint
        self._answer_tokens: list[int] = []

    def add(self, token: int) -> bool:
        """Add a generated token; return whether the answer ends with it."""
        self._answer_tokens += self._thinking.add(token)
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
        kept = self._thinking.tokens if self._settings.thinking == "keep" else []
        thinking = self._marks.text(kept) or None
        if self._thinking.is_open:
            failure = AnswerCutOff(f"the model had not ended its thinking after {count:,} tokens; raise max_tokens")
            return Answer("", finish_reason, count, thinking, failure)
        if self.constraint is not None:
            text = self.constraint.text(self._answer_tokens)
            return Answer(text, finish_reason, count, thinking, self.constraint.failure(count))
        text, has_stop = self._before_stop(self._answer_tokens)
        return Answer(text.strip(), "stop" if has_stop else finish_reason, count, thinking)

    def _before_stop(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Return the text before the first stop string, and whether there is one."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        starts = [start for stop in self._settings.stop if (start := text.find(stop)) >= 0]
        return (text[: min(starts)], True) if starts else (text, False)
