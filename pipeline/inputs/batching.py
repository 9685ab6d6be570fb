"""Put documents into groups that are answered together, and prepare the next group while one is answered.

A document with few queries would leave most of a batch empty, so documents that follow each other share a batch. The
groups depend on the job only: rounding depends on which rows share a batch, and a run that was interrupted must give
the same bytes as one that was not. For the same reason a shard consists of whole groups; the id of a group's first
document decides which shard has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import TypeVar

from pipeline.inputs.documents import Document
from pipeline.job.shards import Shard

GROUP_CHARACTERS = 200_000  # most text of a group, because its prefixes are in memory together
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def group_documents(
    documents: Iterable[Document],
    batch_size: int,
    alone: Collection[str] = (),
    shard: Shard | None = None,
    stages: Callable[[Document], Sequence[int]] = lambda document: [len(document.queries)],
) -> Iterator[list[Document]]:
    """Yield the documents in groups that fill a batch in each of their stages, or that hold less if texts are long.

    alone: ids of documents that share no batch; the other documents of their groups are then alone too. shard: yield
    the groups of this shard only. stages: returns how many of a document's queries are asked together, then how many
    behind these, and so on.

    >>> texts = [Document(str(i), "a text", {}, ["Who?", "When?", "Why?"]) for i in range(7)]
    >>> [[document.id for document in group] for group in group_documents(texts, 8)]
    [['0', '1', '2'], ['3', '4', '5'], ['6']]
    >>> [[document.id for document in group] for group in group_documents(texts, 8, alone={"1"})]
    [['0'], ['1'], ['2'], ['3', '4', '5'], ['6']]
    """
    for group in _full_groups(documents, batch_size, stages):
        if shard is not None and Shard.of(group[0].id, shard.count) != shard:
            continue
        if any(document.id in alone for document in group):
            yield from ([document] for document in group)
        else:
            yield group


def _full_groups(
    documents: Iterable[Document], batch_size: int, stages: Callable[[Document], Sequence[int]]
) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters, rows = 0, list[int]()
    for document in documents:
        if group and characters + len(document.text) > GROUP_CHARACTERS:
            yield group
            group, characters, rows = [], 0, []
        group.append(document)
        characters += len(document.text)
        rows = [sum(both) for both in zip_longest(rows, stages(document), fillvalue=0)]
        if min(rows) >= batch_size:
            yield group
            group, characters, rows = [], 0, []
    if group:
        yield group


def ahead(items: Iterable[_Item], function: Callable[[_Item], _Result]) -> Generator[_Result]:
    """Yield `function(item)` for every item; a thread computes the next result while the caller uses the last one.

    The items are read in that thread too. The caller must close the generator if it does not exhaust it.
    """
    iterator, end = iter(items), object()

    def step() -> _Result | object:
        item = next(iterator, end)
        return item if item is end else function(item)  # type: ignore[arg-type]

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        upcoming: Future[_Result | object] = pool.submit(step)
        while (result := upcoming.result()) is not end:
            upcoming = pool.submit(step)
            yield result  # type: ignore[misc]
