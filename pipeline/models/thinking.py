"""Where a model's thinking ends and its answer begins, by the marks that its tokenizer has for that.

Knows tokens and marks; not templates or rows, nor what becomes of either part. Models that think without marks of their
own in the vocabulary are taken to answer at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TAIL = 4  # tokens, such as line breaks, that a template may put behind the mark with which it has a model think


class Marks:
    """The marks of a tokenizer (mlx-lm's wrapper), if it has any."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.start: list[int] = list(tokenizer.think_start_tokens or ())
        self.end: list[int] = list(tokenizer.think_end_tokens or ())

    def watch(self, prompt: Sequence[int], may_think: bool = True) -> Thinking:
        """For what is generated behind a prompt; a model that may not think does so where the prompt begins it."""
        is_open = self._ends_with_start(prompt)
        return Thinking(self, is_open, is_over=not self.start or not (is_open or may_think))

    def text(self, tokens: Sequence[int]) -> str:
        """The text of thinking, without its marks."""
        inner = list(tokens)
        if inner[: len(self.start)] == self.start:
            inner = inner[len(self.start) :]
        if inner[-len(self.end) :] == self.end:
            inner = inner[: -len(self.end)]
        text: str = self._tokenizer.decode(inner, skip_special_tokens=True)
        return text.strip()

    def _ends_with_start(self, prompt: Sequence[int]) -> bool:
        if not self.start:
            return False
        tail: str = self._tokenizer.decode(list(prompt[-len(self.start) - _TAIL :]))
        return tail.rstrip().endswith(self._tokenizer.think_start)


class Thinking:
    """Tells one row's thinking from its answer, token by token; ``tokens`` are the thinking's, with its marks."""

    def __init__(self, marks: Marks, is_open: bool, is_over: bool) -> None:
        self._marks = marks
        self.is_open, self._is_over = is_open and not is_over, is_over
        self.tokens: list[int] = []

    @property
    def awaited(self) -> int | None:
        """The token with which thinking would begin, or go on beginning; None where it has begun or will not."""
        return None if self.is_open or self._is_over else self._marks.start[len(self.tokens)]

    def take(self, token: int) -> list[int]:
        """Take what was generated next; returns the tokens that are now known to be the answer's."""
        if self._is_over:
            return [token]
        begins = token == self.awaited
        self.tokens.append(token)
        if self.is_open:
            self._is_over = self.tokens[-len(self._marks.end) :] == self._marks.end
            self.is_open = not self._is_over
        elif begins:
            self.is_open = len(self.tokens) == len(self._marks.start)
        else:
            self._is_over = True
            answer, self.tokens = self.tokens, []
            return answer
        return []
