"""Work on several threads: results in order, errors raised, and the BLAS as it was."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

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


@pytest.fixture
def two_blas_threads() -> Iterator[None]:
    own = max(blas_threads(), default=1)
    set_blas_threads(2)
    yield
    set_blas_threads(own)


@pytest.mark.usefixtures("two_blas_threads")
def test_the_blas_is_as_it_was_after_calls_at_once() -> None:
    """The calls begin one after the other, and would end in that order if they overlapped."""
    before, runs = blas_threads(), [threading.Event(), threading.Event()]

    def work(call: int) -> None:
        runs[call].set()
        if call == 0:
            runs[1].wait(0.2)
        else:
            first.result()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run_in_parallel, work, [0, 0])
        assert runs[0].wait(10)
        pool.submit(run_in_parallel, work, [1, 1]).result()
    assert blas_threads() == before


def set_blas_threads(count: int) -> None:
    """Set them in a thread that ends: threadpoolctl lets no other thread change what a living one has set."""
    thread = threading.Thread(target=threadpool_limits, args=(count, "blas"))
    thread.start()
    thread.join()
