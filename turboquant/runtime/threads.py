"""Run NumPy's work on several threads, as many as the BLAS was told to use."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
# Two calls at once would share the cores, and the second to end would leave the BLAS at the first one's limit.
_one_call = threading.Lock()
_AVX512 = ("SkylakeX", "Cooperlake", "SapphireRapids")  # OpenBLAS's names of its kernels


def run_in_parallel(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Call ``work`` for each item here and in other threads, each with a BLAS of one thread; return results in order.

    This spreads exponentials over the cores too, and no core waits for another one within a matrix product, which takes
    twice as long on a busy machine. Of calls in several threads, one runs after the other. ``work`` must not evaluate
    MLX arrays or call this function.
    """
    threads = min(thread_count(), len(items))
    if threads <= 1:
        return [work(item) for item in items]
    results: dict[int, _Result] = {}
    numbers = itertools.count()  # its next() is atomic

    def do_some() -> None:
        while (number := next(numbers)) < len(items):
            results[number] = work(items[number])

    with _one_call, _blas().limit(limits=1):
        others = [_pool(thread_count()).submit(do_some) for _ in range(threads - 1)]
        try:
            do_some()
        finally:
            wait(others)
        for other in others:
            other.result()
    return [results[number] for number in range(len(items))]


@functools.cache
def thread_count() -> int:
    """Return how many threads the BLAS was told to use, which is the number that the user wants."""
    return max((library["num_threads"] for library in _blas().info()), default=1)


@functools.cache
def multiplies_uncopied() -> bool:
    """Return whether NumPy's BLAS has kernels that multiply small matrices without copies: OpenBLAS's for AVX-512."""
    return any(library.get("architecture") in _AVX512 for library in _blas().info())


@functools.cache
def _blas() -> Any:
    return ThreadpoolController().select(user_api="blas")


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="numpy")
