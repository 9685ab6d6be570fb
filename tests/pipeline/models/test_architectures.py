"""Every architecture of the installed mlx-lm, tiny and with random weights, through prefill, store and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pipeline.models.batch_trial import distance, find_batching, try_batching
from pipeline.models.mlx_lm_internals import embedding_rows
from pipeline.models.row_generator import Row, RowGenerator
from tests.turboquant.model_table import model_files
from tests.turboquant.tiny_models import NOT_BUILT, build
from turboquant import CacheCodec, Prefix, enabled
from turboquant.caches.prefix import Segment, join, make_resident, prefill_segment
from turboquant.io.identity import Identity
from turboquant.io.segment_file import read_segment, write_segment
from turboquant.mlx_lm.families import BATCHING, Batching, known_batching

CODEC = CacheCodec(8, 8)
DOCUMENTS = (30, 20)  # tokens; longer than the models' windows
NOT_STORED = {"deepseek_v41": "LayerCache, which cannot be stored"}  # told in a warning
QUERIES = ((0, 2, 2), (0, 6, 3), (1, 4, 2))  # document, tokens of the query, tokens of the answer


def tokens(count: int, seed: int) -> list[int]:
    return [(37 * seed + 11 * index * index + 5 * index) % 90 + 1 for index in range(count)]


def segments(model: Any, document: int, length: int) -> list[Segment]:
    """The document's segments of at most ``length`` tokens."""
    context, chain, parent = tokens(DOCUMENTS[document], document), [], None
    for start, stop in pairwise([*range(0, len(context), length), len(context)]):
        chain.append(prefill_segment(model, context[start:stop], CODEC, parent, chunk=16))
        parent = join(chain)
    return chain


def through_a_store(folder: Path, chain: Sequence[Segment]) -> list[Segment]:
    """The segments as another thread reads them, after it has written them."""

    def store() -> list[Segment]:
        restored = []
        for number, segment in enumerate(chain):
            place = folder / str(number)
            place.mkdir(parents=True)
            write_segment(place, "key", segment, Identity("w", "t", CODEC.identity, "exact"))
            restored.append(read_segment(place, "key", CODEC, segment.start))
        return restored

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(store).result()


def answers(model: Any, prefixes: Sequence[Prefix], batching: Batching) -> list[mx.array]:
    """Log-probabilities (tokens, vocabulary) of the answers about these documents; two rows are decoded at a time."""
    rows = []
    asked = [query for query in QUERIES if query[0] < len(prefixes)]
    for number, (document, length, steps) in enumerate(asked):
        given = iter(tokens(steps + 1, 50 + number))
        sampler = lambda _, given=given: mx.array([next(given)])  # noqa: E731
        rows.append(Row(prefixes[document], tokens(length, 30 + number), steps, sampler))
    found: list[list[mx.array]] = [[] for _ in rows]
    with enabled(model), RowGenerator(model, batching, rows, 2) as generator:
        while responses := generator.next_generated():
            for response in responses:
                found[response.row].append(response.logprobs)
        return [mx.stack(each) for each in found]


@pytest.mark.parametrize("family", [file for file in model_files() if file not in NOT_BUILT])
def test_every_architecture_answers_alike_alone_and_in_batches_fresh_and_restored(family: str, tmp_path: Path) -> None:
    model = build(family)
    known = known_batching(model)
    assert embedding_rows(model) is not None
    assert find_batching(model, 96) == known
    if known != "together":  # the trial finds it without the list
        assert try_batching(model, 96) == known

    chains = [segments(model, document, 100) for document in range(len(DOCUMENTS))]
    expected = answers(model, make_resident([join(chain) for chain in chains], "dense"), "one by one")

    if not_stored := NOT_STORED.get(family):
        with pytest.raises(TypeError, match=not_stored):
            through_a_store(tmp_path, chains[0])
    else:
        chains = [through_a_store(tmp_path / str(number), chain) for number, chain in enumerate(chains)]
    restored = make_resident([join(chain) for chain in chains], "packed")
    assert distance(expected, answers(model, restored, known)) < 1e-3

    # A segment is attended to after it is compressed, and experts may be chosen by a hair.
    found = answers(model, [join(segments(model, 0, 16))], known)
    assert distance(expected[: len(found)], found) < 0.3


def test_every_architecture_that_is_known_to_be_wrong_in_batches_is_tested() -> None:
    assert BATCHING.keys() <= set(model_files()) - NOT_BUILT.keys()
