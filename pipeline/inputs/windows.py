"""Cut documents that are longer than the model reads: into windows, or to their beginning.

A window's context leaves room for the longest query and its answer. A query counts as many tokens as it has bytes, and
every prompt is measured with the same short query. Therefore a row's fingerprint can cover everything that decides the
cuts without a tokenizer, and a query that is added to the job seldom moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.errors import ContextTooLong
from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import PromptTokenizer, Rendered, Renderer
from pipeline.inputs.questions import chain_of
from pipeline.job.job import Generation, Job, Query, Settings
from pipeline.models.loading import max_context, model_folder, read_config

OVERLAP = 16  # a window shares 1/16 of its text with the next one
_PROBE = "What"
_TEMPLATE_BYTES = 4096  # more than any chat template adds to a prompt
_SPARE = 64  # 1/64 of the room may stay empty
_ROUNDS = 40
_CHARACTERS_PER_TOKEN = 16  # few texts have more: it bounds the text that is tokenised to find a window's end


def reserved_tokens(queries: Sequence[Query], generation: Generation) -> int:
    """Return how many tokens are kept free after a context, enough for any of the queries and its answer."""
    chain = chain_of(queries)
    return max(
        len(query.text.encode()) + query.settings(generation).longest + chain.reserve(query, generation)
        for query in queries
    )


def prompt_room(settings: Settings, limit: int) -> int:
    """Return the most tokens that the prompt of a query may have. limit: the most that the model reads."""
    return limit - settings.longest


def too_long(context: int, suffix: int, settings: Settings, limit: int | None) -> ContextTooLong | None:
    """Return an error if context, suffix and the longest answer, in tokens, are more than the model's limit."""
    if limit is None or context + suffix <= prompt_room(settings, limit):
        return None
    return ContextTooLong(
        f"{context:,} tokens of context, {suffix:,} of the query and up to {settings.longest:,} of the "
        f"answer are {context + suffix + settings.longest:,}; the model reads {limit:,}"
    )


def combined(rendered: Rendered, answers: Sequence[str]) -> Rendered:
    """Return the context from which a query is answered after it was answered on each window of a document.

    answers: on each window, with the evidence for it if there is any.
    """
    parts = (f"Part {number}: {answer}" for number, answer in enumerate(answers, start=1))
    introduction = f"A document was read in {len(answers)} parts, and this was answered on each of them.\n\n"
    return replace(rendered, context=introduction + "\n\n".join(parts))


class WindowCutter:
    """Cuts a job's documents as `documents.too_long` says."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._renderer = Renderer(job.prompt, job.documents)
        self._policy = job.documents.too_long
        self._stated_limit = None if self._policy == "error" else max_context(read_config(model_folder(job)))

    def mark(self, rendered: Rendered, queries: Sequence[Query]) -> str | None:
        """Return what a row's fingerprint must cover of the cuts, or None if the document is certainly not cut."""
        if self._policy == "error":
            return None
        tokens = reserved_tokens(queries, self._job.generation)
        size = len(f"{rendered.system}{rendered.context}".encode(errors="replace")) + _TEMPLATE_BYTES
        if self._stated_limit is not None and size + tokens <= self._stated_limit:
            return None
        return f"{self._policy} {tokens}"

    def windows(
        self,
        document: Document,
        rendered: Rendered,
        tokenizer: PromptTokenizer,
        limit: int | None,
        check: Callable[[], None] = lambda: None,
    ) -> list[Rendered]:
        """Return the parts of a document that a model reads, each rendered as a context.

        limit: the most tokens that the model reads at once, or None. The whole document is returned if it fits, and
        also if not even one character of it fits. check: is called between windows, and may raise an exception to end
        the work. Raises PromptFailed.
        """
        if limit is None or self.mark(rendered, document.queries) is None:
            return [rendered]
        room, characters = limit - reserved_tokens(document.queries, self._job.generation), len(document.text)
        most = _CHARACTERS_PER_TOKEN * max(room, 1)
        windows: list[Rendered] = []
        start = end = 0
        while end < characters and (not windows or self._policy == "split"):
            check()

            def tokens(count: int, start: int = start) -> int:
                window = self._rendered(document, start, start + count)
                return tokenizer.count([tokenizer.prompt_text(window, _PROBE)])[0]

            end = start + longest_fitting(min(characters - start, most), room, tokens)
            if self._policy == "truncate" and start + most == end < characters:  # there may be room for more
                most *= 2
                continue
            if end == start or end - start == characters:
                return [rendered]
            windows.append(self._rendered(document, start, end))
            most = 2 * (end - start)
            start = end - (end - start) // OVERLAP
        return windows

    def _rendered(self, document: Document, start: int, end: int) -> Rendered:
        columns = {**document.columns, self._job.documents.text: document.text[start:end]}
        return replace(self._renderer.render(replace(document, columns=columns)), start=start, end=end)


def longest_fitting(characters: int, room: int, tokens: Callable[[int], int]) -> int:
    """Return how many characters, of at most `characters`, have tokens that nearly fill the room and do not exceed it.

    tokens: returns the tokens of the first characters of the text; it is called as seldom as possible.

    >>> longest_fitting(1000, 300, lambda count: count // 2), longest_fitting(1000, 500, lambda count: count // 2)
    (596, 1000)
    """
    fits, exceeds = 0, characters  # numbers of characters
    fits_tokens, exceeds_tokens = tokens(0), tokens(characters)
    if exceeds_tokens <= room:
        return characters
    for number in range(_ROUNDS):
        if exceeds - fits <= 1 or fits_tokens >= room - room // _SPARE:
            break
        if number % 3 < 2:  # linear interpolation, to the middle of what is close enough to the room
            missing = room - room // (2 * _SPARE) - fits_tokens
            guess = fits + missing * (exceeds - fits) // max(exceeds_tokens - fits_tokens, 1)
        else:  # bisection, for texts whose tokens are spread unevenly
            guess = (fits + exceeds) // 2
        guess = min(max(guess, fits + 1), exceeds - 1)
        if (guess_tokens := tokens(guess)) <= room:
            fits, fits_tokens = guess, guess_tokens
        else:
            exceeds, exceeds_tokens = guess, guess_tokens
    return fits
