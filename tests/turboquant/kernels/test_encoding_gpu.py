"""The GPU encoder's text, compiled as C++ and run thread by thread, against the codec on the same vectors."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.turboquant.kernels.emulator import emulated_launch, faulty_launch
from turboquant import CacheCodec
from turboquant.kernels import encoding_gpu
from turboquant.kernels.encoding import encode_layer
from turboquant.quant import rounding
from turboquant.quant.codec import Codec, Encoded
from turboquant.quant.packing import unpack
from turboquant.quant.rounding import RoundingMetric

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
HEADS = 2


@pytest.fixture
def emulated(compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel is run as C++; lanes hold no blocks in it, so there is one layout. Arrays lie now before, now behind
    pages that may not be read.
    """
    ends = itertools.cycle([True, False])
    monkeypatch.setattr(
        encoding_gpu, "launch", lambda *given: emulated_launch(compiled_kernels, "cuda", *given, at_end=next(ends))
    )
    monkeypatch.setattr(encoding_gpu, "on_cpu", lambda: False)
    _forget()
    yield
    _forget()


def _forget() -> None:
    encoding_gpu._runs.cache_clear()
    encoding_gpu._factors.cache_clear()


def a_metric(dim: int) -> NDArray[np.float64]:
    """Queries look in some directions more than in others."""
    looks = np.random.default_rng(1).normal(size=(HEADS, 3 * dim, dim)) * np.geomspace(0.1, 3, dim)
    return looks.swapaxes(1, 2) @ looks


def vectors(tokens: int, dim: int, offset: float = 0.0) -> mx.array:
    return mx.array(np.random.default_rng(0).normal(size=(HEADS, tokens, dim)).astype(np.float32)) + offset


def assert_equal(found: Encoded, expected: Encoded, codec: Codec, most: float) -> None:
    """But for so many of the codes."""
    one, other = (np.array(unpack(x.codes, codec.bits, codec.head_dim)) for x in (found, expected))
    assert one.shape == other.shape
    assert (one != other).mean() <= most
    np.testing.assert_allclose(np.array(found.scales), np.array(expected.scales), rtol=1e-2)


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_nearest_levels(bits: int, dim: int) -> None:
    codec, x, mean = Codec(dim, bits), vectors(70, dim, 0.5), mx.full((HEADS, 1, dim), 0.5)
    order = mx.array(np.random.default_rng(2).permutation(70)[None, :50].repeat(HEADS, 0).astype(np.int32))
    found = encoding_gpu.encode(x, order, mean[:, 0], codec, None)
    assert_equal(found, codec.encode(mx.take_along_axis(x, order[..., None], axis=1), mean), codec, 1e-4)


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_in_a_metric(bits: int, dim: int) -> None:
    codec, x, mean = Codec(dim, bits), vectors(40, dim), mx.zeros((HEADS, 1, dim))
    metric = codec.rounding_metric(a_metric(dim))  # of NumPy, as on a CPU
    order = mx.broadcast_to(mx.arange(40, dtype=mx.int32), (HEADS, 40))
    found = encoding_gpu.encode(x, order, mean[:, 0], codec, metric)
    assert_equal(found, codec.encode(x, mean, metric), codec, 0.01)  # sums are rounded otherwise, and a tie is a tie


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_feedback_of_a_metric(dim: int) -> None:
    metric = a_metric(dim)
    metric = metric / np.abs(metric).max() + rounding.DAMPING * np.eye(dim)
    found = np.array(encoding_gpu.feedback(mx.array(metric.astype(np.float32))))
    np.testing.assert_allclose(found, rounding.feedback(np, metric), atol=1e-5)
    assert encoding_gpu.factors(dim)


@needs_compiler
@pytest.mark.usefixtures("emulated")
def test_a_metric_made_ready_on_a_gpu_is_numpy_s(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, metric = Codec(64, 4), a_metric(64)
    expected = codec.rounding_metric(metric)
    monkeypatch.setattr("turboquant.quant.codec.array_module", lambda: mx)
    found = codec.rounding_metric(mx.array(metric.astype(np.float32)), encoding_gpu.feedback)
    for name in ("factor", "pull", "damped"):
        np.testing.assert_allclose(np.array(getattr(found, name)), getattr(expected, name), atol=1e-4)


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("count", [1, 33])
def test_two_vectors_at_a_time_get_the_codes_of_one_at_a_time(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, x, mean = Codec(128, 4), vectors(40, 128), mx.zeros((HEADS, 128))
    metric = RoundingMetric.prepare(mx, mx.array(a_metric(128).astype(np.float32)))
    order = mx.broadcast_to(mx.arange(count, dtype=mx.int32), (HEADS, count))
    found = []
    for backend, at_a_time in (("metal", 1), ("cuda", 2)):
        monkeypatch.setattr(encoding_gpu, "gpu", lambda backend=backend: backend)
        assert dict(encoding_gpu._encode_launch(codec, True, HEADS, count).constants)["VECTORS"] == at_a_time
        found.append(encoding_gpu.encode(x, order, mean, codec, metric))
    one, two = found
    assert mx.array_equal(one.codes, two.codes)
    assert mx.array_equal(one.scales, two.scales)


@needs_compiler
@pytest.mark.usefixtures("emulated")
def test_a_vector_s_codes_depend_on_it_alone() -> None:
    codec, x, mean = Codec(64, 3), vectors(40, 64), mx.zeros((HEADS, 64))
    metric = RoundingMetric.prepare(mx, mx.array(a_metric(64).astype(np.float32)))
    order = mx.broadcast_to(mx.arange(40, dtype=mx.int32), (HEADS, 40))
    whole = encoding_gpu.encode(x, order, mean, codec, metric)
    some = encoding_gpu.encode(x[:, 5:], order[:, 3:20] - 2, mean, codec, metric)
    assert mx.array_equal(whole.codes[:, 6:23], some.codes)
    assert mx.array_equal(whole.scales[:, 6:23], some.scales)


@needs_compiler
@pytest.mark.usefixtures("emulated")
def test_the_mean_is_removed_from_vectors_that_are_shorter_without_it() -> None:
    x = mx.concatenate([vectors(10, 64, 3.0), vectors(10, 64)], axis=1)
    codec, mean, order = Codec(64, 4), mx.full((HEADS, 64), 3.0), mx.broadcast_to(mx.arange(20), (HEADS, 20))
    scales = np.array(encoding_gpu.encode(x, order, mean, codec, None).scales)
    assert (scales[:, :10] > 0).all()
    assert (scales[:, 10:] < 0).all()


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_vectors_of_any_size(size: float) -> None:
    codec, x = Codec(64, 4), vectors(20, 64) * size
    order = mx.broadcast_to(mx.arange(20, dtype=mx.int32), (HEADS, 20))
    found = encoding_gpu.encode(x, order, mx.zeros((HEADS, 64)), codec, None)
    assert_equal(found, codec.encode(x, mx.zeros((HEADS, 1, 64))), codec, 1e-4)


@needs_compiler
@pytest.mark.usefixtures("emulated")
def test_layers_are_encoded_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    launch = encoding_gpu.launch
    monkeypatch.setattr(encoding_gpu, "launch", lambda *inputs: calls.append(1) or launch(*inputs))
    keys, values = vectors(300, 64), vectors(300, 64, 1.0)
    found = encode_layer(keys, values, CacheCodec())
    monkeypatch.setattr(encoding_gpu, "usable", lambda *_: False)
    for one, other in zip(found.decode(), encode_layer(keys, values, CacheCodec()).decode(), strict=True):
        assert float(mx.abs(one - other).max()) < 0.3
        assert float(mx.abs(one - other).mean()) < 1e-3
    assert len(calls) >= 4


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_kernel_that_fails_is_not_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoding_gpu, "launch", faulty_launch(fault))
    monkeypatch.setattr(encoding_gpu, "on_cpu", lambda: False)
    encoding_gpu._runs.cache_clear()
    assert not encoding_gpu.usable(Codec(64, 4), mx.float32, True)
    encoding_gpu._runs.cache_clear()
    assert "MLX's operations are used" in caplog.text
