"""NumPy's work shared out among the cores, as many as the BLAS was told to use. Knows nothing of what the work is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run_in_parallel(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Do each item on a thread of its own, with a BLAS that keeps to one thread; the results in the items' order.

    Exponentials are then shared among the cores as well, and no core waits for another inside of a product, which
    on a busy machine takes twice as long. MLX's arrays are not to be computed in ``work``.
    """
    threads = _threads()
    if threads == 1 or len(items) == 1:
        return [work(item) for item in items]
    with _blas().limit(limits=1):
        return list(_pool(threads).map(work, items))


@functools.cache
def _blas() -> Any:
    return ThreadpoolController().select(user_api="blas")


@functools.cache
def _threads() -> int:
    """How many threads the BLAS was told to use, which is how many the user wants used."""
    return max((library["num_threads"] for library in _blas().info()), default=1)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="numpy")
