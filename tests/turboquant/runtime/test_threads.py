"""Work on several threads: results in order, errors raised, and the BLAS as it was."""

from __future__ import annotations

import threading
import time

import pytest
from threadpoolctl import threadpool_info

from turboquant.runtime import threads
from turboquant.runtime.threads import run_in_parallel


@pytest.fixture(params=[1, 2, 5], autouse=True)
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(threads, "thread_count", lambda: request.param)
    return int(request.param)


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_results_are_in_order_and_every_thread_takes_part(count: int) -> None:
    names = set()

    def work(item: int) -> int:
        names.add(threading.get_ident())
        time.sleep(0.01)
        return item * item

    before = blas_threads()
    assert run_in_parallel(work, range(20)) == [item * item for item in range(20)]
    assert len(names) == count
    assert threading.get_ident() in names
    assert blas_threads() == before
    assert run_in_parallel(work, []) == []


def test_an_error_is_raised_when_all_threads_are_done(count: int) -> None:
    running = []

    def work(item: int) -> None:
        running.append(item)
        time.sleep(0.005)
        running.remove(item)
        if item == 3:
            raise ValueError(item)

    with pytest.raises(ValueError, match="3"):
        run_in_parallel(work, range(10))
    assert running == []
