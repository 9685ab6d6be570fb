"""Run NumPy's work on several threads, as many as the BLAS was told to use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run_in_parallel(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Call ``work`` for each item on a pool of threads, while the BLAS uses one thread; return results in items' order.

    This spreads exponentials over the cores too, and no core waits for another one within a matrix product, which takes
    twice as long on a busy machine. ``work`` must not evaluate MLX arrays.
    """
    threads = thread_count()
    if threads == 1 or len(items) == 1:
        return [work(item) for item in items]
    with _blas().limit(limits=1):
        return list(_pool(threads).map(work, items))


@functools.cache
def thread_count() -> int:
    """Return how many threads the BLAS was told to use, which is the number that the user wants."""
    return max((library["num_threads"] for library in _blas().info()), default=1)


@functools.cache
def _blas() -> Any:
    return ThreadpoolController().select(user_api="blas")


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="numpy")
