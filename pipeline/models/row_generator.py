"""Generate tokens for many rows, and decode together only those that the model can.

mlx-lm's BatchGenerator changes the answers of some architectures, see ``turboquant.mlx_lm.families.BATCHING``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from pipeline.models.mlx_lm_internals import BatchGenerator, generate_step, generation_stream, greedy_sampler
from turboquant import Prefix
from turboquant.mlx_lm.families import Batching
from turboquant.runtime.device import on_cpu, wait_on_gpu

Sampler = Callable[[mx.array], mx.array]
# Rows that are prefilled together on a CPU. They are padded to the longest, which takes as long as if it were tokens.
# Fewer rows would be padded less, but rows of each group begin a step after those of the one before.
ROWS_PREFILLED = 16


@dataclass(frozen=True)
class Row:
    """A row to decode: its prefix, and the tokens behind it (at least one).

    sampler: makes a token of log-probabilities (1, vocabulary); the generator's own if None. processors: logits
    processors of mlx-lm's.
    """

    prefix: Prefix
    tokens: list[int]
    max_tokens: int
    sampler: Sampler | None = None
    processors: Sequence[Any] = ()


@dataclass(frozen=True)
class Response:
    """A token of the row with the number ``row``, with the log-probabilities (vocabulary,) that it was chosen by.

    finish_reason: "stop" or "length" for the last token, else None.
    """

    row: int
    token: int
    logprobs: mx.array
    finish_reason: str | None


class RowGenerator:
    """Generates the tokens of rows, whose numbers are their places in ``rows``. Must run inside of ``enabled(model)``.

    batching: which rows may be decoded together. batch_size: how many; a row joins as another leaves, if rows of any
    length may be decoded together. Use it as a context manager.
    """

    def __init__(
        self,
        model: Any,
        batching: Batching,
        rows: Sequence[Row],
        batch_size: int,
        stop_tokens: Sequence[int] = (),
        sampler: Sampler = greedy_sampler,
    ) -> None:
        self._model, self._batch_size, self._stop_tokens, self._sampler = model, batch_size, stop_tokens, sampler
        self._rows, self._batching = rows, batching
        self._waiting = deque(_batches(rows, batching, batch_size))
        self._running: dict[int, int] = {}  # rows of the current batch by mlx-lm's number
        self._batch: BatchGenerator | None = None
        self._single: Iterator[tuple[int, mx.array]] | None = None  # the current row, if it is decoded by itself
        self._single_tokens = 0
        self.stream = generation_stream

    def __enter__(self) -> RowGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_batch()

    def next_generated(self) -> list[Response]:
        """Return the next token of each row that is decoded now; nothing if all rows have ended."""
        if not self._running and not self._start_batch():
            return []
        if self._batch is None:
            return [self._next_of_single_row()]
        responses = [
            Response(self._running[each.uid], each.token, each.logprobs, each.finish_reason)
            for each in self._batch.next_generated()
        ]
        ended = {response.row for response in responses if response.finish_reason is not None}
        self._running = {uid: row for uid, row in self._running.items() if row not in ended}
        return responses

    def remove(self, row: int) -> None:
        """End a row that has not ended by itself."""
        uid = next(uid for uid, number in self._running.items() if number == row)
        del self._running[uid]
        if self._batch is not None:
            with mx.stream(self.stream):
                self._batch.remove([uid])

    def _start_batch(self) -> bool:
        self._end_batch()
        if not self._waiting:
            return False
        numbers = self._waiting.popleft()
        rows = [self._rows[number] for number in numbers]
        if self._batching == "one by one":
            (row,) = rows
            self._running, self._single_tokens = {0: numbers[0]}, 0
            self._single = generate_step(
                mx.array(row.tokens),
                self._model,
                max_tokens=row.max_tokens,
                sampler=row.sampler or self._sampler,
                logits_processors=list(row.processors),
                prompt_cache=row.prefix.fork(),
            )
            return True
        self._batch = BatchGenerator(
            self._model,
            stop_tokens=[[token] for token in self._stop_tokens],
            sampler=self._sampler,
            completion_batch_size=self._batch_size,
            prefill_batch_size=min(self._batch_size, ROWS_PREFILLED) if on_cpu() else self._batch_size,
        )
        uids = self._batch.insert(
            [list(row.tokens) for row in rows],
            max_tokens=[row.max_tokens for row in rows],
            caches=[row.prefix.fork() for row in rows],
            samplers=[row.sampler for row in rows],
            logits_processors=[list(row.processors) for row in rows],
        )
        self._running = dict(zip(uids, numbers, strict=True))
        return True

    def _next_of_single_row(self) -> Response:
        assert self._single is not None
        number = self._running[0]
        token, logprobs = next(self._single)
        self._single_tokens += 1
        reason = "length" if self._single_tokens == self._rows[number].max_tokens else None
        reason = "stop" if token in self._stop_tokens else reason
        if reason is not None:
            self._running = {}
        return Response(number, token, logprobs, reason)

    def _end_batch(self) -> None:
        if self._batch is not None or self._single is not None:
            wait_on_gpu(self.stream)
        if self._batch is not None:
            self._batch.close()
        self._batch = self._single = None


def _batches(rows: Sequence[Row], batching: Batching, batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of rows that BatchGenerator is given together."""
    if batching == "together":
        order = list(range(len(rows)))
        if on_cpu() and batch_size > ROWS_PREFILLED:  # rows that are prefilled together have about equal lengths
            order.sort(key=lambda number: (number // batch_size, len(rows[number].tokens)))
        yield order
        return
    # Rows of one prefix and of equal length. A row that joined later would be shorter than those that had begun.
    groups: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((id(row.prefix), len(row.tokens)), []).append(number)
    size = batch_size if batching == "equal lengths" else 1
    for numbers in groups.values():
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]
