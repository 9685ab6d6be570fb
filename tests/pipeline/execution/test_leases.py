"""Who is handed which documents, and what becomes of those whose worker is lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from pipeline.errors import RowError
from pipeline.execution.leases import Lease, Leases
from pipeline.execution.task import DocumentTask
from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import Rendered
from pipeline.inputs.questions import Question
from pipeline.job.job import Query

QUERIES = [Query(id="who", text="Who?"), Query(id="when", text="When?")]


def task(name: str) -> DocumentTask:
    return DocumentTask(
        Document(name, "a text", {}, QUERIES),
        Rendered(None, "a text"),
        QUERIES,
        questions={query.id: Question(query.text) for query in QUERIES},
    )


def give_up(task: DocumentTask, error: RowError) -> DocumentTask:
    return replace(task, decided=task.failures(error))


def leases(*groups: str, stored: dict[str, str] | None = None) -> Leases:
    """Of groups that are written as their documents' names."""

    def each() -> Iterator[list[DocumentTask]]:
        yield from ([task(name) for name in group] for group in groups)

    return Leases(each(), lambda group: (stored or {}).get(group[0].document_id), give_up)


def taken(lease: Lease | None) -> str:
    assert lease is not None
    return "".join(lease.documents)


def answer(given: Leases, lease: Lease) -> None:
    given.complete(lease)


def test_groups_are_handed_out_in_order_until_all_are_answered() -> None:
    given = leases("ab", "c")
    first, second = given.take("s", True), given.take("s", False)
    assert (taken(first), taken(second), given.take("s", True)) == ("ab", "c", None)
    assert not given.are_done()
    for lease in (second, first):
        answer(given, lease)
    assert given.are_done()


def test_groups_with_nothing_left_need_no_worker() -> None:
    done = replace(task("a"), queries=[])
    given = Leases(iter([[done], [task("b")], [done]]), lambda group: None, give_up)
    assert [[each.document_id for each in group] for group in given.take_done()] == [["a"]]
    assert taken(given.take("s", True)) == "b"
    assert [len(group) for group in given.take_done()] == [1]


def test_what_was_lost_is_next_and_nobody_is_to_blame_once() -> None:
    given = leases("a", "b", "c")
    first, second = given.take("s", True), given.take("s", False)
    given.lose(second, "s", None)
    given.lose(first, "s", "died")
    assert given.take("s", False) is None  # it is answered by a worker that has nothing else in hand
    assert [taken(given.take("s", True)) for _ in range(3)] == ["a", "b", "c"]


def test_documents_whose_worker_dies_twice_are_tried_alone_and_then_fail() -> None:
    given = leases("ab", "c")
    for _ in range(2):
        given.lose(given.take("s", True), "s", "died on ada")
    assert taken(given.take("s", True)) == "a"
    for _ in range(2):
        alone = given.take("s", True)
        assert taken(alone) == "b"
        given.lose(alone, "s", "died on ada")
    (failed,) = given.take_done()
    assert {row.error_type for row in failed[0].decided.values()} == {"ModelProcessDied"}
    assert "the model's process died on ada, twice" in str(failed[0].decided["who"].error)
    assert taken(given.take("s", True)) == "c"


def test_a_machine_that_goes_is_no_death() -> None:
    given = leases("a")
    for _ in range(9):
        given.lose(given.take("s", True), None, None)
    assert taken(given.take("s", True)) == "a"


def test_documents_go_where_their_prefixes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    given = leases("a", "b", "c", "d", stored={"a": "far", "b": "near", "d": "gone"})
    given.stores = {"near", "far"}
    assert [taken(given.take("near", True)) for _ in range(3)] == ["b", "c", "d"]
    assert given.take("near", False) is None
    assert given.take("near", True) is None  # a worker of the other store may be free soon
    monkeypatch.setattr("pipeline.execution.leases.PATIENCE", 0.0)
    assert given.take("near", False) is None
    assert taken(given.take("near", True)) == "a"


def test_a_lost_lease_goes_to_the_store_it_was_at() -> None:
    given = leases("a", "b")
    given.stores = {"near", "far"}
    given.lose(given.take("far", True), "far", "died")
    assert taken(given.take("near", True)) == "b"
    assert taken(given.take("far", True)) == "a"
