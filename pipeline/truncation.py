"""Documents that are longer than the model reads: how much of their text is left where a job says `truncate`.

The end of a text is cut off until its context leaves room for the longest query and answer. A query counts as many
tokens as it has bytes, and every prompt is measured with the same short query. So the cut depends on what a row's
fingerprint can cover without a tokenizer, and adding a query seldom moves it. Knows prompts and tokens, no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.documents import Document
from pipeline.job import Generation, Job, Query
from pipeline.model import max_context, read_config, resolve_model
from pipeline.prompts import PromptTokenizer, Rendered, Renderer

_PROBE = "What"
_TEMPLATE_BYTES = 4096  # more than any chat template adds to a prompt
_SPARE = 64  # one part in so many of the room may stay empty
_ROUNDS = 40


def reserved(queries: Sequence[Query], generation: Generation) -> int:
    """The tokens kept free behind a context, for any of the queries and its answer."""
    return max(len(query.text.encode()) + query.settings(generation).max_tokens for query in queries)


class Truncation:
    """Whether and where a job's documents are cut off."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._renderer = Renderer(job.prompt)
        self.wanted = job.documents.too_long == "truncate"
        self._stated_limit = max_context(read_config(resolve_model(job.model))) if self.wanted else None

    def mark(self, rendered: Rendered, queries: Sequence[Query]) -> int | None:
        """What a row's fingerprint has to cover of the cut: None where the document is certainly short enough."""
        if not self.wanted:
            return None
        tokens = reserved(queries, self._job.generation)
        size = len(f"{rendered.system}{rendered.context}".encode(errors="replace")) + _TEMPLATE_BYTES
        if self._stated_limit is not None and size + tokens <= self._stated_limit:
            return None
        return tokens

    def cut(self, document: Document, rendered: Rendered, tokenizer: PromptTokenizer, limit: int | None) -> Rendered:
        """The document, rendered with as much of its text as a model that reads ``limit`` tokens has room for.

        Unchanged where all fits, or nothing does. Raises PromptFailed.
        """
        if limit is None or self.mark(rendered, document.queries) is None:
            return rendered
        room = limit - reserved(document.queries, self._job.generation)

        def tokens(characters: int) -> int:
            (count,) = tokenizer.count([tokenizer.prompt_text(self._shortened(document, characters), _PROBE)])
            return count

        characters = longest(len(document.text), room, tokens)
        return self._shortened(document, characters) if 0 < characters < len(document.text) else rendered

    def _shortened(self, document: Document, characters: int) -> Rendered:
        columns = {**document.columns, self._job.documents.text: document.text[:characters]}
        return self._renderer.render(replace(document, columns=columns))


def longest(characters: int, room: int, tokens: Callable[[int], int]) -> int:
    """How many characters' ``tokens`` are within the room, and nearly fill it.

    >>> longest(1000, 300, lambda characters: characters // 2), longest(1000, 500, lambda characters: characters // 2)
    (596, 1000)
    """
    fits, over = 0, characters
    fitting, most = tokens(0), tokens(characters)
    if most <= room:
        return characters
    for number in range(_ROUNDS):
        if over - fits <= 1 or fitting >= room - room // _SPARE:
            break
        # Where the line through both ends meets the middle of what is near enough; now and then halfway.
        wanted = room - room // (2 * _SPARE) - fitting
        guess = fits + wanted * (over - fits) // max(most - fitting, 1) if number % 3 < 2 else (fits + over) // 2
        guess = min(max(guess, fits + 1), over - 1)
        if (found := tokens(guess)) <= room:
            fits, fitting = guess, found
        else:
            over, most = guess, found
    return fits
