"""Reads answers from generated tokens: where thinking ends, where an answer does, and what its text is.

Knows a tokenizer and one row's tokens; not how they come about, nor what becomes of an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import AnswerCutOff, RowError
from pipeline.job.job import Settings
from pipeline.models.constraints import Constraint, Grammars
from pipeline.models.thinking import Marks, Thinking

_MARGIN = 8  # tokens before a stop string, of which the first may be half a character


@dataclass(frozen=True)
class Answer:
    """``finish_reason`` is ``stop`` or ``length``; ``tokens`` counts those generated, without the stop token.

    ``text`` ends before the first of the stop strings, if one was met. ``thinking`` is kept where that is asked for. An
    answer that is of no use has a ``failure``.
    """

    text: str
    finish_reason: str
    tokens: int
    thinking: str | None = None
    failure: RowError | None = None


class OutputParser:
    """Reads what a model generates; ``tokenizer`` is mlx-lm's wrapper, ``schemas`` are those that answers may follow.

    Raises ModelError where its tokens cannot be held to a schema.
    """

    def __init__(self, tokenizer: Any, schemas: Collection[str] = ()) -> None:
        self._tokenizer, self._marks = tokenizer, Marks(tokenizer)
        self._grammars = Grammars(tokenizer, schemas)

    def begin(self, prompt: Sequence[int], settings: Settings) -> RowParser:
        """For the answer to a prompt, of which the last tokens will do."""
        constraint = None
        if settings.json_schema is not None:
            watched = self._marks.watch(prompt, may_think=bool(settings.thinking))
            constraint = self._grammars.constraint(settings.json_schema, watched)
        return RowParser(self._tokenizer, self._marks, self._marks.watch(prompt), settings, constraint)


class RowParser:
    """What has been generated for one prompt. ``constraint`` is what keeps it to its schema, if it has one."""

    def __init__(
        self, tokenizer: Any, marks: Marks, thinking: Thinking, settings: Settings, constraint: Constraint | None
    ) -> None:
        self._tokenizer, self._marks, self._thinking, self._settings = tokenizer, marks, thinking, settings
        self.constraint = constraint
        self._tokens: list[int] = []  # of the answer

    def take(self, token: int) -> bool:
        """Add a token; whether the answer ends with it."""
        self._tokens += self._thinking.take(token)
        if self.constraint is not None:
            return self.constraint.is_complete
        return bool(self._settings.stop) and self._ends_with_a_stop()

    def answer(self, reason: str) -> Answer:
        """What it makes when nothing follows, and why nothing does."""
        count = len(self._thinking.tokens) + len(self._tokens)
        kept = self._thinking.tokens if self._settings.thinking == "keep" else []
        thought = self._marks.text(kept) or None
        if self._thinking.is_open:
            failure = AnswerCutOff(f"the model had not ended its thinking after {count:,} tokens; raise max_tokens")
            return Answer("", reason, count, thought, failure)
        if self.constraint is not None:
            return Answer(self.constraint.text(self._tokens), reason, count, thought, self.constraint.failure(count))
        text, stopped = self._cut(self._tokens)
        return Answer(text.strip(), "stop" if stopped else reason, count, thought)

    def _ends_with_a_stop(self) -> bool:
        """Whether the last token completed a stop string; told from few tokens, each having a byte of text at least."""
        window = max(len(stop.encode()) for stop in self._settings.stop) + _MARGIN
        if self._cut(self._tokens[-window:])[1]:
            return self._cut(self._tokens)[1]  # the beginning of a window may not decode as it does whole
        return False

    def _cut(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """The text before the first stop string, and whether there is one."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        found = [at for stop in self._settings.stop if (at := text.find(stop)) >= 0]
        return (text[: min(found)], True) if found else (text, False)
