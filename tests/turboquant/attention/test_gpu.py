"""The GPU kernels' text, compiled as C++ and run thread by thread, against attention.py on the same layers."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.turboquant.kernels.emulator import emulated_launch, faulty_launch
from turboquant import CacheCodec, EncodedLayer
from turboquant.attention import gpu as attention_gpu
from turboquant.attention import reference as attention
from turboquant.kernels.encoding import encode_layer
from turboquant.kernels.kernel_text import Launch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
SCALE = 0.125


@pytest.fixture(params=["cuda", "metal"])
def emulated(request: pytest.FixtureRequest, compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in the emulator, with lanes as one of the backends has them, and the memory that may not be read
    right behind arrays or right before them.
    """
    attention_gpu._plan.cache_clear()
    monkeypatch.setattr(attention_gpu, "gpu", lambda: request.param)
    launched = functools.partial(emulated_launch, compiled_kernels, request.param, at_end=request.param == "cuda")
    monkeypatch.setattr(attention_gpu, "launch", launched)


@pytest.fixture(params=["many", "held"])
def on_hopper(request: pytest.FixtureRequest, compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of Hopper GPUs run in the emulator: for many queries, or for few queries and many tokens."""
    attention_gpu._plan.cache_clear()
    monkeypatch.setattr(attention_gpu, "gpu", lambda: "cuda")
    monkeypatch.setattr(attention_gpu, "is_hopper", lambda: True)
    monkeypatch.setattr(attention_gpu, "MANY", 0 if request.param == "many" else 1 << 30)
    monkeypatch.setattr(attention_gpu, "FEW_TOKENS", 0)
    launched = functools.partial(emulated_launch, compiled_kernels, "cuda", at_end=request.param == "many")
    monkeypatch.setattr(attention_gpu, "launch", launched)


def assert_equal(queries: mx.array, layer: EncodedLayer, tolerance: float = 1e-3) -> None:
    part = attention.Partial(*attention_gpu._attend(queries, layer, SCALE))
    expected = attention.attend_layer(queries, layer, SCALE)
    assert part.output.shape == expected.output.shape
    found, wanted = np.array(part.output), np.array(expected.output)
    assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted)
    np.testing.assert_allclose(np.array(part.logsumexp), np.array(expected.logsumexp), rtol=3e-4, atol=5e-3)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("groups", [2, 8, 528])
def test_finer_tokens_have_splits_of_their_own_or_share_all_splits(
    groups: int, random_layer: Callable[..., EncodedLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_gpu, "GROUPS", dict.fromkeys(attention_gpu.GROUPS, groups))
    layer = random_layer(700, CacheCodec(extra_bits=1.0))
    assert_equal(mx.random.normal((1, 4, 1, 64)) * 2, layer)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bits", [(4, 4), (4, 3), (3, 2), (2, 6), (5, 8), (8, 4)])
def test_all_bits(bits: tuple[int, int], random_layer: Callable[..., EncodedLayer]) -> None:
    layer = random_layer(150, CacheCodec(*bits, extra_bits=1.0))
    assert layer.keys.tokens
    assert layer.fine_keys.tokens
    assert_equal(mx.random.normal((1, 4, 1, 64)) * 2, layer)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("batch", "heads", "length"), [(1, 2, 1), (3, 4, 2), (2, 2, 9)])
def test_head_dims_and_any_number_of_rows(
    dim: int, batch: int, heads: int, length: int, random_layer: Callable[..., EncodedLayer]
) -> None:
    layer = random_layer(100, CacheCodec(), key_dim=dim)
    assert_equal(mx.random.normal((batch, heads, length, dim)) * 2, layer)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dim", [64, 128])
def test_more_queries_a_thread_group_for_many_tokens(
    dim: int, monkeypatch: pytest.MonkeyPatch, random_layer: Callable[..., EncodedLayer]
) -> None:
    monkeypatch.setattr(attention_gpu, "FEW_TOKENS", 0)
    assert_equal(mx.random.normal((3, 4, 9, dim)) * 2, random_layer(100, CacheCodec(), key_dim=dim))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("tokens", [1, 16, 17, 31, 130, 700])
@pytest.mark.parametrize("codec", [CacheCodec(), CacheCodec(sinks=0, window=0, extra_bits=0.0), CacheCodec(sinks=40)])
def test_any_number_of_tokens_of_each_kind(
    tokens: int, codec: CacheCodec, random_layer: Callable[..., EncodedLayer]
) -> None:
    assert_equal(mx.random.normal((1, 2, 1, 64)), random_layer(tokens, codec))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("groups", [1, 2, 64, 4096])
def test_any_number_of_splits(
    groups: int, monkeypatch: pytest.MonkeyPatch, random_layer: Callable[..., EncodedLayer]
) -> None:
    """Also more than there are tokens for: some then find nothing."""
    attention_gpu._plan.cache_clear()
    monkeypatch.setattr(attention_gpu, "GROUPS", {1: groups})
    monkeypatch.setattr(attention_gpu, "WARPS", 2)
    assert_equal(mx.random.normal((1, 4, 1, 64)), random_layer(900, CacheCodec()))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("tokens", [1, 70, 150])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_rows_with_tokens_of_their_own(
    tokens: int, masked: bool, dtype: mx.Dtype, random_layer: Callable[..., EncodedLayer]
) -> None:
    """K/V are a part of a larger buffer, as caches have them, and queries lie across."""
    batch, layer = 3, random_layer(100, CacheCodec())
    queries = mx.random.normal((batch, 1, 4, 64)).astype(dtype).swapaxes(1, 2)
    keys, values = (mx.random.normal((batch, 2, 256, 64)).astype(dtype)[:, :, :tokens] for _ in range(2))
    mask = (mx.arange(tokens) >= mx.array([[0], [tokens // 2], [tokens - 1]]))[:, None, None] if masked else None
    mx.eval(queries, keys, values, mask)
    found = attention_gpu.attend_step(queries, layer, keys, values, SCALE, mask)
    parts = attention.attend_layer(queries, layer, SCALE), attention.attend_dense(queries, keys, values, SCALE, mask)
    wanted = np.array(attention.merge(parts).output)
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    assert np.linalg.norm(np.array(found) - wanted) < 1e-3 * np.linalg.norm(wanted)


@pytest.mark.usefixtures("emulated")
def test_one_mask_for_all_rows(random_layer: Callable[..., EncodedLayer]) -> None:
    layer, queries = random_layer(100, CacheCodec()), mx.random.normal((3, 4, 1, 64))
    keys, values = (mx.random.normal((3, 2, 20, 64)) for _ in range(2))
    mask = (mx.arange(20) >= 7)[None, None, None]
    mx.eval(queries, keys, values, mask)
    found = attention_gpu.attend_step(queries, layer, keys, values, SCALE, mask)
    assert mx.array_equal(attention_gpu.attend_step(queries, layer, keys, values, SCALE, mask[0, 0]), found)
    parts = attention.attend_layer(queries, layer, SCALE), attention.attend_dense(queries, keys, values, SCALE, mask)
    wanted = np.array(attention.merge(parts).output)
    assert np.linalg.norm(np.array(found) - wanted) < 1e-3 * np.linalg.norm(wanted)


@pytest.mark.usefixtures("emulated")
def test_sharp_attention(random_layer: Callable[..., EncodedLayer]) -> None:
    """What rounding queries to halves costs grows with the scores, which decide between a few tokens here."""
    layer = random_layer(300, CacheCodec())
    assert_equal(mx.random.normal((1, 4, 1, 64)) * 40, layer, 1e-2)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("size", [1e-5, 1e4])
def test_values_of_any_size(size: float) -> None:
    keys, values = mx.random.normal((2, 200, 64)), mx.random.normal((2, 200, 64)) * size
    assert_equal(mx.random.normal((1, 4, 1, 64)), encode_layer(keys, values, CacheCodec()))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [mx.float16])
def test_queries_in_half_precision(dtype: mx.Dtype, random_layer: Callable[..., EncodedLayer]) -> None:
    assert_equal(mx.random.normal((1, 4, 1, 64)).astype(dtype), random_layer(100, CacheCodec()))


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("dim", "bits"), [(128, (4, 4)), (128, (3, 3)), (64, (4, 3)), (64, (2, 6)), (64, (8, 5))])
def test_hopper_all_bits(bits: tuple[int, int], dim: int, random_layer: Callable[..., EncodedLayer]) -> None:
    layer = random_layer(150, CacheCodec(*bits, extra_bits=1.0), key_dim=dim)
    assert layer.keys.tokens
    assert layer.fine_keys.tokens
    assert_equal(mx.random.normal((1, 4, 1, dim)) * 2, layer)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("tokens", [1, 63, 64, 700])
@pytest.mark.parametrize("codec", [CacheCodec(), CacheCodec(sinks=0, window=0, extra_bits=0.0), CacheCodec(sinks=80)])
def test_hopper_any_number_of_tokens_of_each_kind(
    tokens: int, codec: CacheCodec, random_layer: Callable[..., EncodedLayer]
) -> None:
    assert_equal(mx.random.normal((1, 2, 1, 64)), random_layer(tokens, codec))


@pytest.mark.usefixtures("on_hopper")
def test_hopper_more_queries_than_a_thread_group_takes(random_layer: Callable[..., EncodedLayer]) -> None:
    assert_equal(mx.random.normal((5, 4, 7, 64)).astype(mx.float16), random_layer(300, CacheCodec()))


@pytest.mark.usefixtures("on_hopper")
def test_hopper_scores_that_grow_shrink_or_are_all_very_low(random_layer: Callable[..., EncodedLayer]) -> None:
    """Weights are relative to a score that the first tile decides, and that a later tile may raise."""
    layer = random_layer(700, CacheCodec(sinks=0))
    directions = mx.array(np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0][:4].astype(np.float32))
    for size in (-60.0, 60.0):
        assert_equal(size * directions[None, :, None], layer, 1e-2)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("size", [1e-5, 1e4])
def test_hopper_values_of_any_size(size: float) -> None:
    keys, values = mx.random.normal((2, 200, 64)), mx.random.normal((2, 200, 64)) * size
    assert_equal(mx.random.normal((1, 4, 1, 64)), encode_layer(keys, values, CacheCodec()))


def test_hopper_kernels_are_tried_too(compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def launched(what: Launch, inputs: list[mx.array]) -> list[mx.array]:
        seen.append(what.name)
        return emulated_launch(compiled_kernels, "cuda", what, inputs)

    attention_gpu._plan.cache_clear()
    attention_gpu.usable.cache_clear()
    monkeypatch.setattr(attention_gpu, "gpu", lambda: "cuda")
    monkeypatch.setattr(attention_gpu, "is_hopper", lambda: True)
    monkeypatch.setattr(attention_gpu, "launch", launched)
    assert attention_gpu.usable(CacheCodec(), 64)
    assert seen == ["attend", "merge", "attend", "merge", "attend_many", "merge"]
    attention_gpu.usable.cache_clear()
    attention_gpu._plan.cache_clear()


def test_other_layers_take_the_reference_s_way(random_layer: Callable[..., EncodedLayer]) -> None:
    """No launch is patched here, and there is no GPU: a kernel would raise."""
    for layer in (
        random_layer(50, CacheCodec(), key_dim=80),
        random_layer(50, CacheCodec(), key_dim=64, value_dim=128),
    ):
        queries = mx.random.normal((1, 2, 1, layer.key_mean.shape[-1]))
        part = attention_gpu.attend_layer(queries, layer, SCALE)
        assert mx.array_equal(part.output, attention.attend_layer(queries, layer, SCALE).output)


@pytest.mark.usefixtures("emulated")
def test_kernels_that_run_are_usable(caplog: pytest.LogCaptureFixture) -> None:
    attention_gpu.usable.cache_clear()
    assert attention_gpu.usable(CacheCodec(), 64)
    assert not caplog.records


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_kernels_that_fail_are_not_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention_gpu, "launch", faulty_launch(fault))
    attention_gpu.usable.cache_clear()
    assert not attention_gpu.usable(CacheCodec(), 64)
    attention_gpu.usable.cache_clear()
    assert "MLX's operations are used" in caplog.text
