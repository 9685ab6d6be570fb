"""The kernels of query statistics, run as C++ thread by thread, against NumPy on the same scores."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.turboquant.kernels.emulator import emulated_launch
from turboquant.kernels import query_stats_gpu
from turboquant.quant.query_stats import NEAR, SINKS, QueryCollector, QueryStatistics, _squared_attention

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
HEADS, REPEATS = 2, 3


@pytest.fixture(params=[True, False])
def emulated(request: pytest.FixtureRequest, compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels run as C++, arrays right before or right behind pages that may not be read."""
    launch = functools.partial(emulated_launch, compiled_kernels, "cuda", at_end=request.param)
    monkeypatch.setattr(query_stats_gpu, "launch", launch)
    monkeypatch.setattr(query_stats_gpu, "on_cpu", lambda: False)
    query_stats_gpu._runs.cache_clear()
    yield
    query_stats_gpu._runs.cache_clear()


def random_scores(samples: int, tokens: int, size: float) -> NDArray[np.float32]:
    shape = (HEADS, REPEATS, samples, tokens)
    return (np.random.default_rng(samples).normal(size=shape) * size).astype(np.float32)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("with_past", [True, False])
@pytest.mark.parametrize(
    ("positions", "tokens"),
    [((0,), 1), ((5, 63, 64, 70), 71), ((10, 255, 256), 257), ((99, 300, 511), 512), ((700, 900), 1000)],
)
def test_squared_attention(positions: tuple[int, ...], tokens: int, with_past: bool, size: float) -> None:
    scores = random_scores(len(positions), tokens, size)
    past = random_scores(len(positions), 1, size) if with_past else None
    sinks = 0 if with_past else SINKS
    wanted = _squared_attention(np, scores.copy(), positions, past, sinks)
    flat = mx.array(scores.reshape(HEADS, -1, tokens))
    before = None if past is None else mx.array(past.reshape(HEADS, -1))
    found = query_stats_gpu.squared_attention(flat, positions, before, sinks)
    for one, other in zip(found, (wanted[0].reshape(HEADS, -1), wanted[1]), strict=True):
        np.testing.assert_allclose(np.array(one), other, rtol=2e-4, atol=1e-7)


@pytest.mark.usefixtures("emulated")
def test_tokens_that_are_near_or_first_or_later_do_not_count() -> None:
    scores = mx.zeros((1, 1, 300))
    by_query, by_token = query_stats_gpu.squared_attention(scores, (200,), None, SINKS)
    counted = np.zeros(300)
    counted[SINKS : 200 - NEAR + 1] = 1 / 201**2
    np.testing.assert_allclose(np.array(by_token)[0], counted, rtol=1e-4)
    np.testing.assert_allclose(np.array(by_query)[0, 0], counted.sum(), rtol=1e-4)


@pytest.mark.usefixtures("emulated")
def test_the_statistics_of_a_layer_are_numpy_s() -> None:
    collector = QueryCollector(400)
    for start in range(0, 400, 100):
        queries = mx.random.normal((1, HEADS * REPEATS, 100, 64), key=mx.random.key(start))
        collector.add(queries, HEADS, start, 0.3)
    known, keys = collector.statistics(), mx.random.normal((HEADS, 400, 64), key=mx.random.key(1))
    assert isinstance(known, QueryStatistics)
    assert query_stats_gpu.usable()

    def as_numpy(kernel: Callable[..., tuple[mx.array, mx.array]], *given: object) -> tuple[object, ...]:
        scores, *others = given
        return tuple(map(np.array, kernel(mx.array(scores), *others)))

    kernel = functools.partial(as_numpy, query_stats_gpu.squared_attention)
    for one, other in zip(known.metric_and_attention(keys, kernel), known.metric_and_attention(keys), strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-3, atol=1e-6)
