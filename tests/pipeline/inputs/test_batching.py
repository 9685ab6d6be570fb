from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.execution.engine
import pipeline.execution.prefixes
from pipeline.inputs.batching import GROUP_CHARACTERS, ahead, group_documents
from pipeline.inputs.documents import Document
from pipeline.job.job import Query
from tests.pipeline.workplace import Workplace

TOGETHER = {"max_tokens": 5, "batch_size": 8}  # with three queries a document, three documents


def document(number: int, size: int, queries: int) -> Document:
    asked = [Query(id=str(n), text="Why?") for n in range(queries)]
    return Document(str(number), "x" * size, {}, asked)


@given(
    st.lists(st.tuples(st.integers(0, GROUP_CHARACTERS + 9), st.integers(1, 9)), max_size=30),
    st.integers(1, 40),
    st.data(),
)
def test_groups(sizes: list[tuple[int, int]], batch_size: int, data: st.DataObject) -> None:
    documents = [document(number, *size) for number, size in enumerate(sizes)]
    cut = list(group_documents(documents, batch_size))
    assert [one for group in cut for one in group] == documents
    for group, after in zip_longest(cut, cut[1:]):
        size = sum(len(one.text) for one in group)
        assert len(group) == 1 or size <= GROUP_CHARACTERS
        rows = [len(one.queries) for one in group]
        assert sum(rows[:-1]) < batch_size
        if after is not None and sum(rows) < batch_size:
            assert size + len(after[0].text) > GROUP_CHARACTERS
    # Documents that are to be alone move no cut but those around them.
    alone = {one.id for one in documents if data.draw(st.booleans())}
    apart = [[one] if {o.id for o in group} & alone else group for group in cut for one in group]
    assert list(group_documents(documents, batch_size, alone)) == [
        group for i, group in enumerate(apart) if i == 0 or apart[i - 1] is not group
    ]


def test_the_next_is_done_while_one_is_used() -> None:
    started: dict[int, threading.Event] = {number: threading.Event() for number in range(4)}
    threads: set[str] = set()

    def do(number: int) -> int:
        threads.add(threading.current_thread().name)
        started[number].set()
        return number * 10

    results = []
    for result in ahead(range(4), do):
        results.append(result)
        assert all(started[number].wait(5) for number in range(min(4, len(results) + 1)))
        assert not any(started[number].is_set() for number in range(len(results) + 1, 4))
    assert results == [0, 10, 20, 30]
    assert threads == {"ahead_0"}


def test_what_goes_wrong_ahead_is_raised_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("gone")

    results = ahead(items(), str)
    assert [next(results), next(results)] == ["1", "2"]
    with pytest.raises(OSError, match="gone"):
        next(results)


# ---- documents answered together


def test_documents_share_a_batch_and_the_answers_are_the_same(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    real = pipeline.execution.engine.generate_answers

    def watching(loaded: Any, requests: Any, *rest: Any) -> Any:
        batches.append(len(requests))
        return real(loaded, requests, *rest)

    monkeypatch.setattr(pipeline.execution.engine, "generate_answers", watching)
    workplace.documents |= {str(n): f"{n} and {n}" for n in range(4)}
    workplace.run()
    assert batches == [3] * 7
    alone = workplace.answers()
    workplace.output.unlink()
    batches.clear()
    report = workplace.run("generation.batch_size=8")
    assert batches == [9, 9, 3]
    assert workplace.answers() == alone
    assert report.prefixes_restored == 7
    assert report.resident == {"dense": 7}


@pytest.mark.parametrize("how", ["packed", "dense"])
def test_how_prefixes_are_attended_is_reported(workplace: Workplace, how: str) -> None:
    workplace.run(f"cache.resident={how}")
    assert workplace.report()["resident"] == {how: 3}
    assert workplace.report()["attention"] == "NumPy"
    answers = workplace.answers()
    workplace.output.unlink()
    workplace.run()
    assert workplace.answers() == answers


def test_only_one_group_s_prefixes_are_alive(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    real = pipeline.execution.prefixes.prefill_segment

    def watching(*args: Any) -> Any:
        if sum(ref() is not None for ref in alive) > 2:
            gc.collect()  # which takes long
        assert sum(ref() is not None for ref in alive) < 3
        segment = real(*args)
        alive.append(weakref.ref(segment.layers[0]))
        return segment

    monkeypatch.setattr("pipeline.execution.prefixes.prefill_segment", watching)
    workplace.tree["generation"] = TOGETHER
    workplace.documents |= {str(n): f"{n} and {n}" for n in range(6)}
    assert workplace.run().prefixes_built == 9
    assert workplace.run().rows_kept == 27


def test_a_document_that_changes_is_answered_without_its_group(workplace: Workplace) -> None:
    workplace.tree["generation"] = TOGETHER
    workplace.run()
    workplace.documents["d1"] = "The board met again."
    report = workplace.run()
    assert (report.rows_answered, report.rows_kept, report.prefixes_built) == (3, 6, 1)


def test_the_parts_of_a_group_are_those_of_its_documents(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise KeyboardInterrupt

    workplace.tree["generation"] = TOGETHER
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.output.results.Results.finish", full)
        with pytest.raises(KeyboardInterrupt):
            workplace.run()
    parts = [pq.read_table(file).to_pylist() for file in workplace.output.parent.glob("*.parts/??/*.parquet")]
    assert sorted((part[0]["document_id"], len(part)) for part in parts) == [("d0", 3), ("d1", 3), ("d2", 3)]


def test_a_document_that_fails_in_a_group_fails_alone(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workplace.run()
    whole = workplace.output.read_bytes()
    workplace.output.unlink()
    real = pipeline.execution.engine.generate_answers

    def failing(loaded: Any, requests: Any, *rest: Any) -> Any:
        answers = real(loaded, requests, *rest)
        if any(request.name.startswith("d1") for request in requests):
            raise RuntimeError("[malloc] Unable to allocate")
        return answers

    done = workplace.observer.rows
    done.clear()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.execution.engine, "generate_answers", failing)
        report = workplace.run("generation.batch_size=8", "retries=0")
    assert report.failures == {"GenerationFailed": 3}
    assert report.rows_answered == 6
    assert sum(done) == 9
    assert "answering 3 documents together failed, so each is tried by itself" in caplog.text
    assert {row["document_id"] for row in workplace.rows().values() if row["status"] == "error"} == {"d1"}
    assert workplace.run().rows_answered == 3
    assert workplace.output.read_bytes() == whole


# ---- what is done ahead and behind


def test_the_next_group_is_restored_ahead(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.documents |= {str(n): f"{n} and {n}" for n in range(4)}
    workplace.run()
    before = workplace.output.read_bytes()
    workplace.output.unlink()
    threads: list[str] = []
    real = pipeline.execution.prefixes.PrefixProvider._load

    def loading(self: Any, piece: Any) -> Any:
        threads.append(threading.current_thread().name)
        return real(self, piece)

    monkeypatch.setattr(pipeline.execution.prefixes.PrefixProvider, "_load", loading)
    report = workplace.run()
    assert (report.prefixes_restored, report.prefixes_built) == (7, 0)
    assert len(threads) == 7
    assert threads.count("ahead_0") >= 5  # the first documents are read before there is a model
    assert workplace.output.read_bytes() == before
