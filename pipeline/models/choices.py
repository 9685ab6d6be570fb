"""Queries whose answer is one of several choices: the probability of each, by scoring all of them on the prefix."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

_TAIL = 8  # tokens of the prompt that decide how the first letters of a choice are tokenised


def choice_tokens(tokenizer: Any, prompt: Sequence[int], choice: str) -> list[int]:
    """Return the tokens of a choice as they continue a prompt.

    tokenizer: mlx-lm's wrapper. A tokenizer may join the first letters to the end of the prompt; then the choice is
    tokenised by itself.
    """
    tail: str = tokenizer.decode(list(prompt[-_TAIL:]))
    before = tokenizer.encode(tail, add_special_tokens=False)
    whole = tokenizer.encode(tail + choice, add_special_tokens=False)
    if whole[: len(before)] == before and len(whole) > len(before):
        return list(whole[len(before) :])
    return list(tokenizer.encode(choice, add_special_tokens=False))


class ForcedTokens:
    """A logits processor of mlx-lm that lets a row write certain tokens only.

    logits: as those of ``Constraint``.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens, self._position = list(tokens), 0
        self.logits: deque[mx.array] = deque()

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Return logits (1, vocabulary) that allow the next token only."""
        import mlx.core as mx

        self.logits.append(logits)
        mx.async_eval([logits])  # type: ignore[no-untyped-call]  # the next token does not depend on them
        token = self._tokens[min(self._position, len(self._tokens) - 1)]  # mlx-lm computes one step ahead
        self._position += 1
        return mx.where(mx.arange(logits.shape[-1]) == token, 0.0, -mx.inf)[None]


def probabilities(scored: Sequence[tuple[Sequence[int], float]]) -> list[float]:
    """Return the probability of each choice, given that the answer begins with one of them.

    scored: the tokens of each choice and their log-probability. Where a choice is the beginning of longer ones, its
    probability is that of the answers that begin with it and with none of these.

    >>> from math import log
    >>> [round(share, 3) for share in probabilities([([1], log(0.6)), ([1, 2], log(0.4)), ([3], log(0.2))])]
    [0.25, 0.5, 0.25]
    """
    highest = max(logprob for _, logprob in scored)
    shares: dict[int, float] = {}
    for number in sorted(range(len(scored)), key=lambda each: len(scored[each][0]), reverse=True):
        tokens, logprob = list(scored[number][0]), scored[number][1]
        longer = sum(share for other, share in shares.items() if list(scored[other][0][: len(tokens)]) == tokens)
        shares[number] = max(math.exp(logprob - highest) - longer, 0.0)
    total = sum(shares.values())
    return [shares[number] / total for number in range(len(scored))]
