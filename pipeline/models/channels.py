"""Separate the messages that a model writes to channels: its answer in the one called final, its thinking in others.

A model of this format, such as gpt-oss, writes `<|channel|>analysis<|message|>…<|end|>`, and then
`<|start|>assistant<|channel|>final<|message|>…`. What stands before `<|message|>` is the header of a message. A header
without a channel belongs to the answer; one with a recipient (`to=`) belongs to the call of a tool.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

_CHANNEL, _MESSAGE, _START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_ANSWER = "final"  # the channel of the answer


class _Place(Enum):
    BEFORE_MESSAGES, HEADER, OTHER_MESSAGE, ANSWER = auto(), auto(), auto(), auto()


class ChannelMarks:
    """The marks of this format. exist: whether the tokenizer, mlx-lm's wrapper, has them as tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        by_text = {added.content: token for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        self.exist = _CHANNEL in by_text and _MESSAGE in by_text
        self.channel, self.message = by_text.get(_CHANNEL), by_text.get(_MESSAGE)
        self.beginnings = frozenset(by_text[text] for text in (_START, _CHANNEL) if text in by_text)
        self.ends = frozenset(by_text[text] for text in _ENDS if text in by_text)

    def parser(self, prompt: Sequence[int], may_think: bool = True) -> ChannelParser:
        """Return a parser for the tokens that are generated after a prompt, which may end within a message.

        may_think: without a meaning here, since these models write to channels in any case.
        """
        return ChannelParser(self, prompt)

    def are_of_answer(self, header: Sequence[int]) -> bool:
        """Return whether a message with this header belongs to the answer."""
        text: str = self._tokenizer.decode(list(header), skip_special_tokens=False)
        _, has_channel, channel = text.partition(_CHANNEL)
        return "to=" not in text and (not has_channel or channel.replace("<", " ").split()[:1] == [_ANSWER])

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of a message."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()


class ChannelParser:
    """Separates the messages of one row, token by token.

    tokens: the tokens so far that do not belong to the answer, with marks and headers.
    """

    def __init__(self, marks: ChannelMarks, prompt: Sequence[int]) -> None:
        self._marks = marks
        self._place = _Place.BEFORE_MESSAGES
        self._has_answer = False
        self._header: list[int] = []
        self.tokens: list[int] = []
        self._messages: list[list[int]] = [[]]
        begun = max((index for index, token in enumerate(prompt) if token in marks.beginnings), default=len(prompt))
        if {marks.channel, marks.message}.intersection(prompt[begun:]):
            for token in prompt[begun:]:
                self.add(token)
        self._has_answer = self._place is _Place.ANSWER
        self.tokens, self._messages = [], [[]]

    @property
    def is_open(self) -> bool:
        """Whether a message is begun, and the answer is not."""
        return not self._has_answer and self._place is not _Place.BEFORE_MESSAGES

    @property
    def next_start_token(self) -> int | None:
        """The mark of a channel, if no message is begun; otherwise None."""
        return self._marks.channel if self._place is _Place.BEFORE_MESSAGES else None

    def text(self) -> str:
        """Return the text of the messages that do not belong to the answer, without marks and headers."""
        return "\n\n".join(filter(None, map(self._marks.text, self._messages)))

    def add(self, token: int) -> list[int]:
        """Add a generated token; return the tokens that are now known to belong to the answer."""
        marks, is_end = self._marks, token in self._marks.ends
        if self._place is _Place.BEFORE_MESSAGES and not (is_end or token in {*marks.beginnings, marks.message}):
            self._enter(_Place.ANSWER)  # a model that writes no messages
        if is_end or token in marks.beginnings:
            self._header = [*(self._header if self._place is _Place.HEADER else ()), token]
            self._enter(_Place.HEADER)
        elif token == marks.message:
            self._enter(_Place.ANSWER if marks.are_of_answer(self._header) else _Place.OTHER_MESSAGE)
        elif self._place is _Place.ANSWER:
            return [token]
        else:
            (self._header if self._place is _Place.HEADER else self._messages[-1]).append(token)
        self.tokens.append(token)
        return []

    def _enter(self, place: _Place) -> None:
        self._place = place
        self._has_answer = self._has_answer or place is _Place.ANSWER
        if place is _Place.OTHER_MESSAGE:
            self._messages.append([])
