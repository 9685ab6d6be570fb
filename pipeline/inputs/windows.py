"""Documents that are longer than the model reads, and what is read of them: the beginning, or all in windows.

The text is cut so that its context leaves room for the longest query and answer. A query counts as many tokens as it
has bytes, and every prompt is measured with the same short query. So the cuts depend on what a row's fingerprint can
cover without a tokenizer, and adding a query seldom moves them. Knows prompts and tokens, no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import PromptTokenizer, Rendered, Renderer
from pipeline.job.job import Generation, Job, Query
from pipeline.models.loading import max_context, read_config, resolve_model

OVERLAP = 16  # windows share one part in so many
_PROBE = "What"
_TEMPLATE_BYTES = 4096  # more than any chat template adds to a prompt
_SPARE = 64  # one part in so many of the room may stay empty
_ROUNDS = 40
_CHARACTERS_A_TOKEN = 16  # seldom as many: bounds what is tokenised to find a window's end


def reserved(queries: Sequence[Query], generation: Generation) -> int:
    """The tokens kept free behind a context, for any of the queries and its answer."""
    return max(len(query.text.encode()) + query.settings(generation).max_tokens for query in queries)


def combined(rendered: Rendered, answers: Sequence[str]) -> Rendered:
    """What a query is asked of when it was answered on each window of a document."""
    said = (f"Part {number}: {answer}" for number, answer in enumerate(answers, start=1))
    told = f"A document was read in {len(answers)} parts, and this was answered on each of them.\n\n"
    return replace(rendered, context=told + "\n\n".join(said))


class WindowCutter:
    """Where a job's documents are cut."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._renderer = Renderer(job.prompt)
        self._policy = job.documents.too_long
        self._stated_limit = None if self._policy == "error" else max_context(read_config(resolve_model(job.model)))

    def mark(self, rendered: Rendered, queries: Sequence[Query]) -> str | None:
        """What a row's fingerprint has to cover of the cuts: None where the document is certainly short enough."""
        if self._policy == "error":
            return None
        tokens = reserved(queries, self._job.generation)
        size = len(f"{rendered.system}{rendered.context}".encode(errors="replace")) + _TEMPLATE_BYTES
        if self._stated_limit is not None and size + tokens <= self._stated_limit:
            return None
        return f"{self._policy} {tokens}"

    def windows(
        self, document: Document, rendered: Rendered, tokenizer: PromptTokenizer, limit: int | None
    ) -> list[Rendered]:
        """What is to be read of a document by a model that reads ``limit`` tokens at once.

        All of it where that fits, or where nothing does. Raises PromptFailed.
        """
        if limit is None or self.mark(rendered, document.queries) is None:
            return [rendered]
        room, whole = limit - reserved(document.queries, self._job.generation), len(document.text)
        most = _CHARACTERS_A_TOKEN * max(room, 1)
        windows: list[Rendered] = []
        start = end = 0
        while end < whole and (not windows or self._policy == "split"):

            def tokens(characters: int, start: int = start) -> int:
                window = self._rendered(document, start, start + characters)
                return tokenizer.count([tokenizer.prompt_text(window, _PROBE)])[0]

            end = start + longest(min(whole - start, most), room, tokens)
            if self._policy == "truncate" and start + most == end < whole:  # and there may be room for more
                most *= 2
                continue
            if end == start or end - start == whole:
                return [rendered]
            windows.append(self._rendered(document, start, end))
            most = 2 * (end - start)
            start = end - (end - start) // OVERLAP
        return windows

    def _rendered(self, document: Document, start: int, end: int) -> Rendered:
        columns = {**document.columns, self._job.documents.text: document.text[start:end]}
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
