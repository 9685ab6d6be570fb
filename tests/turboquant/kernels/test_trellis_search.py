"""The kernels for trellis codes, compiled as C++ and run thread by thread, against NumPy's encoder."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.turboquant.kernels.emulator import emulated_launch, faulty_launch
from turboquant import CacheCodec
from turboquant.kernels import encoding, trellis_search
from turboquant.kernels.encoding import encode_layer
from turboquant.quant.codec import Encoded
from turboquant.quant.query_stats import QueryCollector
from turboquant.quant.rounding import RoundingMetric
from turboquant.quant.trellis import BLOCK, TrellisCodec

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
HEADS, DIM, TOKENS = 2, 32, 3 * BLOCK  # a SIMD-group works on two blocks of keys
KINDS: list[tuple[Literal["keys", "values"], int]] = [("keys", 2), ("keys", 3), ("keys", 4), ("values", 2)]
KINDS += [("values", 3), ("values", 4)]


@pytest.fixture
def emulated(request: pytest.FixtureRequest, compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are run as C++. Arrays lie now before, now behind pages that may not be read."""
    backend, ends = getattr(request, "param", "cuda"), itertools.cycle([True, False])
    launch = functools.partial(emulated_launch, compiled_kernels, backend)
    monkeypatch.setattr(trellis_search, "launch", lambda *given: launch(*given, at_end=next(ends)))
    monkeypatch.setattr(trellis_search, "gpu", lambda: backend)
    monkeypatch.setattr(trellis_search, "on_cpu", lambda: False)
    trial = trellis_search._runs
    trial.cache_clear()
    yield
    trial.cache_clear()


def unit_vectors() -> NDArray[np.float32]:
    """Vectors (H, dim, T) of norm sqrt(dim) that are halves, as the kernel gets them."""
    x = np.random.default_rng(1).normal(size=(HEADS, DIM, TOKENS))
    return (x / np.sqrt(np.square(x).mean(axis=1, keepdims=True))).astype(np.float16).astype(np.float32)


def roots() -> NDArray[np.float32]:
    return np.random.default_rng(2).uniform(0.5, 1.5, (HEADS, TOKENS)).astype(np.float32)


def a_metric(codec: TrellisCodec, heads: int = HEADS) -> RoundingMetric:
    """Queries look in some directions more than in others."""
    looks = np.random.default_rng(3).normal(size=(heads, 3 * codec.head_dim, codec.head_dim))
    looks *= np.linspace(0.3, 2, codec.head_dim)
    return codec.rounding_metric(looks.swapaxes(1, 2) @ looks)


def levels_of(codec: TrellisCodec, words: Any) -> NDArray[np.float32]:
    levels: NDArray[np.float32] = codec.decode_levels(np, np.array(words)).swapaxes(1, 2)
    return levels


# Without a metric, the backends differ in the SIMD-groups of a thread-group alone, whatever the bits.
@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("emulated", "of", "bits"),
    [*(("cuda", *kind) for kind in KINDS), ("metal", "keys", 3), ("metal", "values", 4)],
    indirect=["emulated"],
)
def test_strings_are_those_of_numpy(of: Literal["keys", "values"], bits: int) -> None:
    codec, unit, root = TrellisCodec(DIM, bits, of=of), unit_vectors(), roots()
    words, factors = codec.choose(np, unit, root, None)
    found, found_factors = trellis_search.choose(codec, mx.array(unit), mx.array(root), None)
    assert np.array_equal(np.array(found), words)
    np.testing.assert_allclose(np.array(found_factors), factors, rtol=1e-3)


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("emulated", "bits"), [("cuda", 2), ("cuda", 3), ("cuda", 4), ("metal", 3)], indirect=["emulated"]
)
def test_strings_in_a_metric_are_as_good_as_those_of_numpy(bits: int) -> None:
    """Products are rounded otherwise, and each difference moves the targets of later coordinates."""
    codec, unit, root = TrellisCodec(DIM, bits, of="keys"), unit_vectors(), roots()
    metric, errors, same = a_metric(codec), [], []
    searched = np.arange(DIM).reshape(-1, 16, 2).swapaxes(1, 2).reshape(-1)  # the order of the metric's rows
    exact = unit[:, searched]
    for words, factors in (
        codec.choose(np, unit, root, metric),
        trellis_search.choose(codec, mx.array(unit), mx.array(root), metric),
    ):
        levels = levels_of(codec, words)[:, searched] * np.array(factors)[:, None]
        off = (levels - exact) * root[:, None]
        errors.append((off * (metric.damped @ off)).sum())
        products = (levels * (metric.damped @ exact)).sum(axis=1), (exact * (metric.damped @ exact)).sum(axis=1)
        np.testing.assert_allclose(*products, rtol=2e-3)
        same.append(levels)
    assert abs(errors[1] / errors[0] - 1) < 0.01
    assert (np.abs(same[0] - same[1]) > 0.05).mean() < 0.1


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("dim", "weighted"), [(64, True), (96, True), (128, False), (256, True)])
def test_vectors_are_centred_rotated_and_weighted_as_by_the_codec(dim: int, weighted: bool) -> None:
    codec, random = TrellisCodec(dim, 2, of="values"), np.random.default_rng(4)
    heads = HEADS if dim < 128 else 1
    near, far = (mx.array(random.normal(size=(heads, 100, dim)).astype(np.float32)) for _ in range(2))
    x, mean = mx.concatenate([near + 2, far], axis=1), mx.full((heads, 1, dim), 2.0)
    order = np.stack([random.permutation(200)[:BLOCK] for _ in range(heads)]).astype(np.int32)
    weights = mx.array(random.uniform(0.1, 2, (heads, 200)).astype(np.float32)) if weighted else None
    found = trellis_search.encode(x, mx.array(order), mean[:, 0], codec, None, weights)
    some = mx.take_along_axis(x, mx.array(order)[..., None], axis=1)
    of_some = None if weights is None else mx.take_along_axis(weights, mx.array(order), axis=1)
    expected = codec.encode(some, mean, None, of_some)
    assert (levels_of(codec, found.codes) != levels_of(codec, expected.codes)).mean() < 0.02  # vectors become halves
    assert mx.array_equal(found.scales > 0, expected.scales > 0)
    assert 0.3 < float((found.scales > 0).astype(mx.float32).mean()) < 0.7
    np.testing.assert_allclose(np.array(found.scales), np.array(expected.scales), rtol=0.06)


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_vectors_of_any_size(size: float) -> None:
    codec = TrellisCodec(32, 2, of="keys")
    x = mx.array(np.random.default_rng(5).normal(size=(1, BLOCK, 32)).astype(np.float32)) * size
    order = mx.arange(BLOCK, dtype=mx.int32)[None]
    found = trellis_search.encode(x, order, mx.zeros((1, 32)), codec, a_metric(codec, 1), None)
    expected = codec.encode(x, mx.zeros((1, 1, 32)), a_metric(codec, 1))
    assert mx.array_equal(found.scales > 0, expected.scales > 0)
    np.testing.assert_allclose(np.array(found.scales), np.array(expected.scales), rtol=0.2)


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("in_metric", [True, False])
def test_a_block_gets_the_same_bits_alone_and_among_others(in_metric: bool) -> None:
    codec, random = TrellisCodec(64, 3, of="keys"), np.random.default_rng(6)
    x = mx.array(random.normal(size=(1, TOKENS, 64)).astype(np.float32))
    metric, mean = a_metric(codec, 1) if in_metric else None, mx.zeros((1, 64))

    def encoded(first: int, last: int) -> Encoded:
        order = mx.arange(first, last, dtype=mx.int32)[None]
        return trellis_search.encode(x, order, mean, codec, metric, None)

    whole = encoded(0, TOKENS)
    for first in range(0, TOKENS, BLOCK):
        alone = encoded(first, first + BLOCK)
        assert mx.array_equal(alone.codes, whole.codes[:, first : first + BLOCK])
        assert mx.array_equal(alone.scales, whole.scales[:, first : first + BLOCK])


@needs_compiler
@pytest.mark.usefixtures("emulated")
def test_layers_are_encoded_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    launch = trellis_search.launch
    monkeypatch.setattr(trellis_search, "launch", lambda *given: calls.append(given[0].name) or launch(*given))
    monkeypatch.setattr(trellis_search, "_runs", lambda *_: True)
    random, codec = np.random.default_rng(7), CacheCodec(2, 3, coding="trellis")
    keys, values = (mx.array(random.normal(size=(HEADS, 300, 64)).astype(np.float32)) for _ in range(2))
    collector = QueryCollector(300)
    collector.add(mx.array(random.normal(size=(1, 4, 300, 64)).astype(np.float32)), HEADS, 0, 0.1)
    found = encode_layer(keys, values, codec, collector.statistics())
    assert sorted(calls[-4:]) == ["search", "search", "units", "units"]
    monkeypatch.setattr(encoding.trellis_search, "usable", lambda *_: False)
    expected = encode_layer(keys, values, codec, collector.statistics())
    for one, other, exact in zip(found.decode(), expected.decode(), (keys, values), strict=True):
        losses = [float(mx.square(decoded - exact).mean()) for decoded in (one, other)]
        assert abs(losses[0] / losses[1] - 1) < 0.02


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("of", "in_metric"), [("keys", True), ("keys", False), ("values", False)])
def test_the_trial_accepts_the_kernels(of: Literal["keys", "values"], in_metric: bool) -> None:
    assert trellis_search.usable(TrellisCodec(64, 4, of=of), mx.float16, in_metric)


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_kernel_that_fails_is_not_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trellis_search, "launch", faulty_launch(fault))
    monkeypatch.setattr(trellis_search, "on_cpu", lambda: False)
    trellis_search._runs.cache_clear()
    assert not trellis_search.usable(TrellisCodec(64, 4), mx.float32, True)
    trellis_search._runs.cache_clear()
    assert "trellis kernels" in caplog.text
