"""The GPU kernels that read trellis codes, compiled as C++ and run thread by thread, against attention/reference.py."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benches.trellis_attention import random_layer
from tests.turboquant.attention.test_gpu import SCALE, assert_equal
from tests.turboquant.kernels.emulator import emulated_launch
from turboquant import CacheCodec, EncodedLayer
from turboquant.attention import gpu as attention_gpu
from turboquant.attention import reference as attention
from turboquant.attention.trellis_tables import PAIRS, pairs_of_levels, sums_of
from turboquant.kernels.kernel_text import Launch
from turboquant.quant.trellis import BLOCK, CODES

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
HEADS = 2
ALL_BITS = [(4, 4), (3, 3), (2, 2), (4, 3), (2, 4)]  # of keys and values


@pytest.fixture
def on_hopper(compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels run in the emulator. Returns the names of those that ran."""
    seen: list[str] = []

    def launched(what: Launch, inputs: list[mx.array]) -> list[mx.array]:
        seen.append(what.name)
        return emulated_launch(compiled_kernels, "cuda", what, inputs, at_end=len(seen) % 4 < 2)

    attention_gpu._plan.cache_clear()
    monkeypatch.setattr(attention_gpu, "gpu", lambda: "cuda")
    monkeypatch.setattr(attention_gpu, "is_hopper", lambda: True)
    monkeypatch.setattr(attention_gpu, "launch", launched)
    return seen


def layer_of(
    blocks: int, bits: tuple[int, int] = (4, 4), dim: int = 64, fine: int = 20, sinks: int = 5, size: float = 1.0
) -> EncodedLayer:
    return random_layer(CacheCodec(*bits, coding="trellis"), (blocks * BLOCK, fine, sinks), HEADS, dim, size)


def random_queries(rows: int, dim: int = 64) -> mx.array:
    return mx.random.normal((rows, 2 * HEADS, 1, dim)) * 2


@pytest.mark.parametrize("bits", sorted(CODES))
def test_ten_sums_decide_both_levels(bits: int) -> None:
    pairs = pairs_of_levels(bits).view(np.float16).reshape(PAIRS, 2)
    for string, code in enumerate(CODES[bits]):
        states = np.arange(1 << code.log_states)
        index = np.zeros_like(states)
        for i, (of, places) in enumerate(sums_of(bits)):
            for k in places if of == string else ():
                index ^= (states >> (bits - 1 - k) & 1) << i
        others = sum(1 << i for i, (of, _) in enumerate(sums_of(bits)) if of != string)
        for other in (0, others):
            assert np.array_equal(pairs[index | other, string], code.table)


@pytest.fixture(params=["cuda", "metal"])
def elsewhere(request: pytest.FixtureRequest, compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for other GPUs runs in the emulator, with lanes as one of the backends has them."""
    attention_gpu._plan.cache_clear()
    monkeypatch.setattr(attention_gpu, "gpu", lambda: request.param)
    launched = functools.partial(emulated_launch, compiled_kernels, request.param, at_end=request.param == "cuda")
    monkeypatch.setattr(attention_gpu, "launch", launched)


@needs_compiler
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("elsewhere", "bits", "dim"),  # every pair of two of them
    [
        *(("cuda", bits, dim) for bits, dim in zip(ALL_BITS, [64, 128, 64, 128, 64], strict=True)),
        *(("metal", bits, dim) for bits, dim in zip(ALL_BITS, [128, 64, 128, 64, 128], strict=True)),
    ],
    indirect=["elsewhere"],
)
def test_other_gpus_all_bits(bits: tuple[int, int], dim: int) -> None:
    assert_equal(random_queries(5, dim), layer_of(3, bits, dim, fine=70, sinks=20))


@needs_compiler
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("blocks", "fine", "sinks"), [(0, 40, 3), (1, 0, 0), (20, 300, 16)])
def test_other_gpus_any_number_of_tokens_of_each_kind(blocks: int, fine: int, sinks: int) -> None:
    assert_equal(random_queries(1), layer_of(blocks, (4, 4), 64, fine, sinks))


@needs_compiler
@pytest.mark.parametrize(
    ("rows", "bits", "dim"),  # every pair of two of them
    [
        *((1, bits, dim) for bits, dim in zip(ALL_BITS, [64, 128, 64, 128, 64], strict=True)),
        *((5, bits, dim) for bits, dim in zip(ALL_BITS, [128, 64, 128, 64, 128], strict=True)),
    ],
)
def test_all_bits(bits: tuple[int, int], dim: int, rows: int, on_hopper: list[str]) -> None:
    assert_equal(random_queries(rows, dim), layer_of(2, bits, dim))
    assert on_hopper == ["attend_many" if rows > 4 else "attend", "merge"]


@needs_compiler
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("blocks", "fine", "sinks"), [(0, 40, 3), (1, 0, 0), (3, 0, 90), (20, 300, 16), (37, 130, 0)])
def test_any_number_of_tokens_of_each_kind(blocks: int, fine: int, sinks: int, rows: int, on_hopper: list[str]) -> None:
    assert_equal(random_queries(rows), layer_of(blocks, (4, 4), 64, fine, sinks))


@needs_compiler
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("groups", [1, 6, 264])
def test_any_number_of_splits(groups: int, rows: int, on_hopper: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Finer tokens have splits of their own, or all splits share them out. Teams get different numbers of tokens."""
    for kind in ("TRELLIS_KIND", "TRELLIS_MANY_KIND"):
        monkeypatch.setattr(attention_gpu, kind, replace(getattr(attention_gpu, kind), groups=groups))
    assert_equal(random_queries(rows), layer_of(19, (3, 3), 64, 140, 7))


@needs_compiler
@pytest.mark.parametrize(("batch", "heads", "length"), [(1, 2, 1), (3, 4, 3), (2, 4, 9)])
def test_any_number_of_rows(batch: int, heads: int, length: int, on_hopper: list[str]) -> None:
    queries = mx.random.normal((batch, heads, length, 64)).astype(mx.float16) * 2
    assert_equal(queries, layer_of(2))


@needs_compiler
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("size", [1e-5, 1e4])
def test_values_of_any_size(size: float, rows: int, on_hopper: list[str]) -> None:
    assert_equal(random_queries(rows), layer_of(2, size=size))


@needs_compiler
@pytest.mark.parametrize("rows", [1, 5])
def test_scores_that_grow_shrink_or_are_all_very_low(rows: int, on_hopper: list[str]) -> None:
    layer = layer_of(9, dim=64)
    directions = mx.array(np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0][:4].astype(np.float32))
    for size in (-60.0, 60.0):
        assert_equal(mx.broadcast_to(size * directions[None, :, None], (rows, 4, 1, 64)), layer, 1e-2)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_with_tokens_of_their_own(rows: int, on_hopper: list[str]) -> None:
    layer, queries = layer_of(3), random_queries(rows)
    keys, values = (mx.random.normal((rows, HEADS, 20, 64)) for _ in range(2))
    mask = (mx.arange(20) >= 7)[None, None, None]
    mx.eval(queries, keys, values, mask)
    found = attention_gpu.attend_step(queries, layer, keys, values, SCALE, mask)
    parts = attention.attend_layer(queries, layer, SCALE), attention.attend_dense(queries, keys, values, SCALE, mask)
    wanted = np.array(attention.merge(parts).output)
    assert np.linalg.norm(np.array(found) - wanted) < 1e-3 * np.linalg.norm(wanted)


@needs_compiler
def test_kernels_for_few_and_for_many_queries_are_tried(on_hopper: list[str]) -> None:
    attention_gpu.usable.cache_clear()
    assert attention_gpu.usable(CacheCodec(2, 2, coding="trellis"), 64)
    assert on_hopper == ["attend", "merge", "attend", "merge", "attend_many", "merge"]
    attention_gpu.usable.cache_clear()


def test_layers_without_a_kernel_take_the_reference_s_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with many coordinates, and those in which only keys or only values are in trellis codes."""
    monkeypatch.setattr(attention_gpu, "usable", lambda codec, dim: True)
    for bits, dim in ((8, 4), 64), ((4, 4), 256):
        assert not attention_gpu.supports(replace(layer_of(1, (4, 4), dim), codec=CacheCodec(*bits, coding="trellis")))
