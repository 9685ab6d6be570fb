"""Which documents are answered together, and how the next ones are read meanwhile.

A document with few queries would leave most of a batch empty, so documents that follow each other share one. Where
the cuts are depends on the job alone: rounding depends on which rows share a batch, and a run that was interrupted
must give what one that was not gives. For the same reason a shard has whole groups, by the ids that these begin with.
Knows documents by their size and queries; nothing of models or rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipeline.inputs.documents import Document
from pipeline.job.shards import Shard

GROUP_CHARACTERS = 200_000  # of text, beyond which no document joins: a group's prefixes are in memory together
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def groups(
    documents: Iterable[Document], batch_size: int, alone: Collection[str] = (), shard: Shard | None = None
) -> Iterator[list[Document]]:
    """The documents in groups that fill a batch, or fewer where texts are long; one by one around those in ``alone``.

    With a shard, those of its groups alone.

    >>> texts = [Document(str(i), "a text", {}, ["Who?", "When?", "Why?"]) for i in range(7)]
    >>> [[document.id for document in group] for group in groups(texts, 8)]
    [['0', '1', '2'], ['3', '4', '5'], ['6']]
    >>> [[document.id for document in group] for group in groups(texts, 8, alone={"1"})]
    [['0'], ['1'], ['2'], ['3', '4', '5'], ['6']]
    """
    for group in _cut(documents, batch_size):
        if shard is not None and Shard.of(group[0].id, shard.count) != shard:
            continue
        if any(document.id in alone for document in group):
            yield from ([document] for document in group)
        else:
            yield group


def _cut(documents: Iterable[Document], batch_size: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = rows = 0
    for document in documents:
        if group and size + len(document.text) > GROUP_CHARACTERS:
            yield group
            group, size, rows = [], 0, 0
        group.append(document)
        size += len(document.text)
        rows += len(document.queries)
        if rows >= batch_size:
            yield group
            group, size, rows = [], 0, 0
    if group:
        yield group


def ahead(items: Iterable[_Item], do: Callable[[_Item], _Result]) -> Generator[_Result]:
    """``do`` of each item, taken and done in another thread while the item before is used. To be closed."""
    iterator, end = iter(items), object()

    def step() -> _Result | object:
        item = next(iterator, end)
        return item if item is end else do(item)  # type: ignore[arg-type]

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        upcoming: Future[_Result | object] = pool.submit(step)
        while (result := upcoming.result()) is not end:
            upcoming = pool.submit(step)
            yield result  # type: ignore[misc]
