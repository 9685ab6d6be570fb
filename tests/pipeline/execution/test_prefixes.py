"""Contexts in segments, as a run meets them: what is shared, repeats, grows or was cut off is prefilled once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commands.plan import plan_job
from pipeline.execution.prefixes import segment_ends
from pipeline.inputs.prompts import SHARED_CHARACTERS
from pipeline.job.job_file import load_job
from tests.pipeline.workplace import Interrupting, Recorder, Workplace

EXAMPLES = "Example. Who met? The board met. When? On the third of May. " * 30


@pytest.fixture
def streaming(workplace: Workplace) -> Workplace:
    """Three documents of about 1,300 tokens, in segments of 512."""
    workplace.documents = {name: text * 5 for name, text in workplace.documents.items()}
    workplace.tree["cache"] = {"dir": "cache", "prefill": "streaming", "segment": 512}
    return workplace


def manifests(workplace: Workplace) -> list[dict[str, Any]]:
    return [json.loads((folder / "segment.json").read_bytes()) for folder in workplace.segments()]


@given(st.integers(1, 5000), st.integers(0, 5000), st.none() | st.integers(512, 5000))
def test_cuts(tokens: int, shared: int, length: int | None) -> None:
    ends = segment_ends(tokens, shared, length)
    assert ends[-1] == tokens
    sizes = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
    assert min(sizes) > 0
    if 0 < shared < tokens:
        assert shared in ends
    if length is None:
        assert len(ends) <= 2
    else:
        assert max(sizes) <= length
        # A context that grows is cut where it was.
        shared = shared if shared < tokens else 0
        whole = segment_ends(tokens, shared, length)[:-1]
        assert segment_ends(tokens + 700, shared, length)[: len(whole)] == whole


# ---- what all documents begin with


@pytest.mark.parametrize("where", ["system", "context"])
def test_what_all_documents_begin_with_is_prefilled_once(
    workplace: Workplace, prefilled: list[int], where: str
) -> None:
    assert len(EXAMPLES) > SHARED_CHARACTERS
    prompt = {"system": EXAMPLES} if where == "system" else {"context": EXAMPLES + "{{ text }}"}
    report = workplace.run_with(prompt=prompt)
    shared = max(prefilled)
    assert len(prefilled) == 4
    assert prefilled.count(shared) == 1
    assert report.prefilled_tokens == sum(prefilled) == report.context_tokens - 2 * shared
    root, *children = sorted(manifests(workplace), key=lambda manifest: manifest["start"])
    assert {child["parent"] for child in children} == {root["key"]}
    assert {child["start"] for child in children} == {root["tokens"]} == {shared}
    before = workplace.output.read_bytes()
    workplace.output.unlink()
    prefilled.clear()
    assert workplace.run().prefixes_restored == 3  # from the disk
    assert workplace.output.read_bytes() == before
    assert prefilled == []
    workplace.documents["d3"] = "A new one."
    workplace.run()
    assert len(prefilled) == 1
    assert prefilled[0] < 100


@pytest.mark.parametrize(
    "prompt",
    [
        {"system": "Short."},
        {"system": EXAMPLES + "{{ id }}"},
        {"context": "{{ text }}" + EXAMPLES},
        {"system": EXAMPLES[: SHARED_CHARACTERS // 2]},
    ],
)
def test_what_is_short_or_differs_is_no_segment(workplace: Workplace, prefilled: list[int], prompt: Any) -> None:
    workplace.run_with(prompt=prompt)
    assert len(prefilled) == 3
    assert {manifest["parent"] for manifest in manifests(workplace)} == {None}


def test_a_shared_segment_that_is_lost_is_built_again(workplace: Workplace, prefilled: list[int]) -> None:
    workplace.run_with(prompt={"system": EXAMPLES})
    before = workplace.output.read_bytes()
    workplace.output.unlink()
    (root,) = (m for m in manifests(workplace) if m["parent"] is None)
    shutil.rmtree(workplace.cache / root["key"][:2] / root["key"])
    prefilled.clear()
    report = workplace.run()
    assert prefilled == [root["tokens"]]
    assert (report.prefixes_built, report.prefixes_restored) == (1, 2)
    assert workplace.output.read_bytes() == before


# ---- streaming


def test_a_streaming_prefill_is_stored_in_pieces(streaming: Workplace, prefilled: list[int]) -> None:
    report = streaming.run()
    assert (report.rows_answered, report.prefixes_built) == (9, 3)
    assert max(prefilled) == 512
    assert len(prefilled) > 6
    chains = [m for m in manifests(streaming) if m["about"]["document"] == "d0"]
    chain = sorted(chains, key=lambda manifest: manifest["start"])
    assert [m["parent"] for m in chain] == [None, *(m["key"] for m in chain[:-1])]
    assert [m["about"]["whole"] for m in chain] == [False] * (len(chain) - 1) + [True]
    before = streaming.output.read_bytes()
    streaming.output.unlink()
    assert streaming.run().prefixes_restored == 3
    assert streaming.output.read_bytes() == before


def test_a_plan_counts_contexts_not_segments(streaming: Workplace) -> None:
    streaming.save(prompt={"system": EXAMPLES[:SHARED_CHARACTERS]})
    streaming.documents = {name: text[:1500] for name, text in streaming.documents.items()} | {"d0": "Short."}
    before = plan_job(load_job(streaming.save()))
    streaming.run()
    after = plan_job(load_job(streaming.save()))
    assert (before.hits, before.misses, before.tokens_to_prefill) == (0, 3, before.tokens)
    assert (after.hits, after.misses, after.tokens) == (3, 0, before.tokens)
    tokens = {row["document_id"]: row["context_tokens"] for row in streaming.rows().values()}
    assert after.tokens == sum(tokens.values())


def test_an_interrupted_streaming_prefill_goes_on_from_its_last_segment(
    streaming: Workplace, prefilled: list[int]
) -> None:
    streaming.run()
    whole, before = list(prefilled), streaming.output.read_bytes()
    shutil.rmtree(streaming.cache)
    streaming.output.unlink()
    prefilled.clear()
    interrupting = Interrupting(chunk=5)  # each segment is one step
    assert streaming.run(observer=interrupting).interrupted
    first = interrupting.prefilled
    streaming.run()
    assert len(first) == 5
    assert first[:4] + prefilled == whole  # the fifth, in flight, is the only one begun twice
    assert streaming.output.read_bytes() == before


def test_a_document_that_grew_keeps_its_segments(streaming: Workplace, prefilled: list[int]) -> None:
    streaming.run()
    kept = [m for m in manifests(streaming) if m["about"]["document"] == "d0" and m["tokens"] == 512]
    streaming.documents["d0"] += "And the board met again in June. " * 15
    cold = Workplace(streaming.folder / "cold", streaming.model)
    cold.documents, cold.tree = dict(streaming.documents), dict(streaming.tree)
    prefilled.clear()
    assert streaming.run().rows_kept == 6
    assert len(kept) == 2
    assert sum(prefilled) == streaming.rows()["d0", "what"]["context_tokens"] - 2 * 512
    cold.run()
    assert streaming.output.read_bytes() == cold.output.read_bytes()


def test_a_context_that_repeats_is_prefilled_once(streaming: Workplace, prefilled: list[int]) -> None:
    streaming.documents["again"] = streaming.documents["d0"]
    assert streaming.run().prefixes_restored == 1
    assert {streaming.answers()["again", query] == streaming.answers()["d0", query] for query in ("what", "who")} == {
        True
    }


@pytest.mark.parametrize("override", ["cache.segment=1024", "cache.prefill=exact"])
def test_other_cuts_are_other_segments(streaming: Workplace, prefilled: list[int], override: str) -> None:
    streaming.run()
    prefilled.clear()
    assert streaming.run(override).rows_answered == 9
    assert prefilled


def test_a_segment_of_another_parent_is_refused(
    streaming: Workplace, prefilled: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Right by all its checksums, under the right key, but encoded about other means."""
    from pipeline.cache.codec import job_codec
    from pipeline.job.job_file import load_job
    from turboquant.io.identity import Identity
    from turboquant.io.segment_file import read_segment, write_segment

    streaming.run()
    before = streaming.output.read_bytes()
    streaming.output.unlink()
    found = manifests(streaming)
    one, other = (next(m for m in found if m["about"]["document"] == d and m["start"] == 512) for d in ("d0", "d1"))
    codec = job_codec(load_job(streaming.save()).cache)
    folders = [streaming.cache / m["key"][:2] / m["key"] for m in (one, other)]
    foreign = read_segment(folders[1], other["key"], codec, 512)
    write_segment(folders[0], one["key"], foreign, Identity(**one["identity"]), one["parent"], one["about"])
    prefilled.clear()
    streaming.run()
    assert "different means" in caplog.text
    assert prefilled == [512]
    assert streaming.output.read_bytes() == before


# ---- what is kept


def test_contexts_of_a_finished_job_may_be_dropped(workplace: Workplace) -> None:
    workplace.tree["cache"] = {"dir": "cache", "keep": "job"}
    stored: list[int] = []

    class Counting(Recorder):
        def prefill_started(self, document_id: str, tokens: int) -> None:
            super().prefill_started(document_id, tokens)
            stored.append(len(workplace.segments()))

    workplace.observer = Counting()
    workplace.run_with(prompt={"system": EXAMPLES})
    assert len(workplace.observer.prefilled) == 4
    assert max(stored) == 1  # the shared segment, between two documents
    assert workplace.segments() == []
    workplace.tree["cache"] = {"dir": "cache"}
    assert workplace.run().rows_kept == 9


def test_what_another_job_needs_is_not_dropped(workplace: Workplace, make_other: Callable[[], Workplace]) -> None:
    other = make_other()
    assert other.run(observer=Interrupting(chunk=2)).interrupted  # in its second document
    workplace.tree["cache"] = {"dir": str(other.cache), "keep": "job"}
    workplace.run()
    documents = {m["about"]["document"]: m["about"]["output"] for m in manifests(other)}
    assert set(documents) == {"d0", "d1", "d2"}
    assert len(set(documents.values())) == 2  # the first was the other's own


def test_what_another_job_keeps_is_not_dropped(workplace: Workplace, make_other: Callable[[], Workplace]) -> None:
    other = make_other()
    del other.documents["d2"]
    other.run()
    workplace.tree["cache"] = {"dir": str(other.cache), "keep": "job"}
    assert workplace.run().prefixes_restored == 2
    assert {m["about"]["document"] for m in manifests(other)} == {"d0", "d1"}


@pytest.fixture
def make_other(workplace: Workplace) -> Callable[[], Workplace]:
    def make() -> Workplace:
        return Workplace(workplace.folder / "other", workplace.model)

    return make
