"""Separate a model's thinking from its answer, by the marks that its tokenizer has for the beginning and the end of it.

A model that thinks without marks of its own in the vocabulary is read as if it answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TAIL = 4  # tokens, such as line breaks, that a template may put after the mark with which it makes a model think


class ThinkingMarks:
    """The tokens with which a model begins (`start`) and ends (`end`) its thinking; both are empty if it has none.

    tokenizer: mlx-lm's wrapper.
    """

    def __init__(self, tokenizer: Any) -> None:
        from pipeline.models.mlx_lm_internals import thinking_marks

        self._tokenizer = tokenizer
        self.start, self.end, self._start_text = thinking_marks(tokenizer)

    def parser(self, prompt: Sequence[int], may_think: bool = True) -> ThinkingParser:
        """Return a parser for the tokens that are generated after a prompt.

        may_think: whether the model may begin to think by itself. It always thinks if the prompt ends with the mark.
        """
        is_open = False
        if self.start:
            tail: str = self._tokenizer.decode(list(prompt[-len(self.start) - _TAIL :]))
            is_open = tail.rstrip().endswith(self._start_text)
        return ThinkingParser(self, is_open, is_over=not self.start or not (is_open or may_think))

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of thinking without its marks."""
        inner = list(tokens)
        if inner[: len(self.start)] == self.start:
            inner = inner[len(self.start) :]
        if inner[-len(self.end) :] == self.end:
            inner = inner[: -len(self.end)]
        text: str = self._tokenizer.decode(inner, skip_special_tokens=True)
        return text.strip()


class ThinkingParser:
    """Separates one row's thinking from its answer, token by token. `ChannelParser` does it for models with channels.

    tokens: the tokens of the thinking so far, with its marks. is_open: whether the thinking has begun and not ended.
    """

    def __init__(self, marks: ThinkingMarks, is_open: bool, is_over: bool) -> None:
        self._marks = marks
        self.is_open, self._is_over = is_open and not is_over, is_over
        self.tokens: list[int] = []

    @property
    def next_start_token(self) -> int | None:
        """The next token of the mark that begins the thinking; None if the thinking has begun or will not begin."""
        return None if self.is_open or self._is_over else self._marks.start[len(self.tokens)]

    def text(self) -> str:
        """Return the text of the thinking so far, without its marks."""
        return self._marks.text(self.tokens)

    def add(self, token: int) -> list[int]:
        """Add a generated token; return the tokens that are now known to belong to the answer."""
        if self._is_over:
            return [token]
        is_start = token == self.next_start_token
        self.tokens.append(token)
        if self.is_open:
            self._is_over = self.tokens[-len(self._marks.end) :] == self._marks.end
            self.is_open = not self._is_over
        elif is_start:
            self.is_open = len(self.tokens) == len(self._marks.start)
        else:
            self._is_over = True
            answer, self.tokens = self.tokens, []
            return answer
        return []
