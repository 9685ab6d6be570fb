"""NumPy's functions equal MLX's, and take their place only where they may."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx_lm.generate import BatchGenerator

from turboquant.mlx_lm.cpu_functions import (
    FEW_ROWS,
    UNCOPIED,
    as_linear,
    linear,
    logsumexp,
    multiply_few,
    numpy_functions,
    rms_norm,
    rope,
    swiglu,
)
from turboquant.mlx_lm.internals import STOCK_SWIGLU

SHAPES = [(1, 1, 7), (1, 300, 1536), (32, 1, 576), (0, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_equals_mlx_s(shape: tuple[int, ...]) -> None:
    gate, x = (mx.random.normal(shape, scale=30, key=mx.random.key(seed)) for seed in (0, 1))
    np.testing.assert_allclose(swiglu(gate, x), STOCK_SWIGLU(gate, x), rtol=2e-6, atol=1e-6)


def test_gates_far_from_zero_overflow_nowhere() -> None:
    gate = mx.array([-1e4, -89.0, 0.0, 89.0, 1e4])
    np.testing.assert_array_equal(swiglu(gate, mx.ones(5)), [0.0, swiglu(gate[1:2], mx.ones(1)).item(), 0.0, 89.0, 1e4])


@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("shape", [(9,), (1, 9), (32, 49152), (3, 2, 70000)])
def test_logsumexp_equals_mlx_s(shape: tuple[int, ...], keepdims: bool) -> None:
    logits = mx.random.normal(shape, scale=20, key=mx.random.key(0))
    found, expected = logsumexp(logits, axis=-1, keepdims=keepdims), mx.logsumexp(logits, axis=-1, keepdims=keepdims)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_masked_logits_and_rows_without_any() -> None:
    logits = mx.array([[-mx.inf, 3.0, -mx.inf], [-mx.inf] * 3, [mx.inf, 0.0, 1.0]])
    np.testing.assert_array_equal(logsumexp(logits, axis=-1), mx.logsumexp(logits, axis=-1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (UNCOPIED, 1), (1, UNCOPIED + 1), (4, FEW_ROWS // 4)])
def test_products_of_a_few_rows_equal_mlx_s(shape: tuple[int, int], bias: bool) -> None:
    layer = Linear(96, 300, bias)  # more outputs than a stripe, and no whole number of blocks
    x = mx.random.normal((*shape, 96), key=mx.random.key(0))
    assert multiply_few(x, layer.weight) is not None
    np.testing.assert_allclose(linear(layer, x), layer(x), rtol=1e-5, atol=1e-5)


def test_logits_of_a_few_rows_equal_mlx_s() -> None:
    layer, x = Embedding(500, 64), mx.random.normal((3, 1, 64), key=mx.random.key(0))
    expected = layer.as_linear(x)  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(as_linear(layer, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [None, mx.random.normal((96,), key=mx.random.key(1))])
@pytest.mark.parametrize("shape", [(0, 96), (96,), (8, 1, 96), (2, 700, 96), (1, 700, 3, 96)])
def test_norms_equal_mlx_s(shape: tuple[int, ...], weight: mx.array | None) -> None:
    x = mx.random.normal(shape, scale=30, key=mx.random.key(0))
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5), mx.fast.rms_norm(x, weight, 1e-5), rtol=2e-6)
    assert rms_norm(x.astype(mx.bfloat16), None, 1e-5).dtype == mx.bfloat16


ROTATIONS: list[dict[str, Any]] = [
    {"dims": 32, "base": 10000.0, "scale": 1.0, "offset": 0, "traditional": False},
    {"dims": 32, "base": 1e6, "scale": 0.5, "offset": 7000, "traditional": False},
    {"dims": 20, "base": 10000.0, "scale": 1.0, "offset": 3, "traditional": False},  # the other dimensions stay
    {"dims": 32, "base": None, "freqs": mx.arange(1.0, 17.0), "scale": 1.0, "offset": 5, "traditional": False},
    {"dims": 32, "base": 10000.0, "scale": 1.0, "offset": 9, "traditional": True},
    {"dims": 32, "base": 10000.0, "scale": 1.0, "offset": mx.array([3, 8]), "traditional": False},
]


@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotations_equal_mlx_s(rotation: dict[str, Any], tokens: int) -> None:
    x = mx.random.normal((2, tokens, 3, 32), key=mx.random.key(0)).swapaxes(1, 2)
    for _ in range(2):  # the second time with the same cosines
        np.testing.assert_allclose(rope(x, **rotation), mx.fast.rope(x, **rotation), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("rows", [0, 1, FEW_ROWS + 1])
def test_other_numbers_of_rows_and_dtypes_are_left_to_mlx_s_products(rows: int) -> None:
    layer = Linear(8, 4)
    x = mx.zeros((rows, 8))
    assert multiply_few(x, layer.weight) is None
    assert multiply_few(mx.zeros((2, 8), mx.bfloat16), layer.weight.astype(mx.bfloat16)) is None
    np.testing.assert_array_equal(linear(layer, x), layer(x))


@pytest.mark.parametrize("axis", [None, 0, (0, 1)])
def test_other_axes_and_dtypes_are_left_to_mlx(axis: Any) -> None:
    logits = mx.random.normal((4, 5), key=mx.random.key(0))
    np.testing.assert_array_equal(logsumexp(logits, axis=axis), mx.logsumexp(logits, axis=axis))
    assert logsumexp(logits.astype(mx.bfloat16), axis=-1).dtype == mx.bfloat16
    assert swiglu(logits.astype(mx.bfloat16), logits.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_they_take_the_place_of_mlx_s_while_the_block_runs(build_model: Callable[..., Any]) -> None:
    model = build_model("llama")
    module = sys.modules[type(model).__module__]
    before = mx.logsumexp, mx.fast.rms_norm, mx.fast.rope, Linear.__call__, Embedding.as_linear
    tokens = mx.arange(FEW_ROWS + 5)[None] % 50
    expected = model(tokens)
    with numpy_functions(model):
        assert (vars(module)["swiglu"], mx.logsumexp) == (swiglu, logsumexp)
        assert (mx.fast.rms_norm, mx.fast.rope) == (rms_norm, rope)
        assert (Linear.__call__, Embedding.as_linear) == (linear, as_linear)
        np.testing.assert_allclose(model(tokens), expected, rtol=1e-4, atol=1e-5)
    assert vars(module)["swiglu"] is STOCK_SWIGLU
    assert (mx.logsumexp, mx.fast.rms_norm, mx.fast.rope, Linear.__call__, Embedding.as_linear) == before


def test_the_generator_normalises_logits_with_what_is_replaced(build_model: Callable[..., Any]) -> None:
    model, shapes = build_model("llama"), []
    with numpy_functions(model), pytest.MonkeyPatch.context() as patch:

        def noted(x: mx.array, **options: Any) -> mx.array:
            shapes.append(x.shape)
            return logsumexp(x, **options)

        patch.setattr(mx, "logsumexp", noted)
        generator = BatchGenerator(model, stop_tokens=[])
        generator.insert([[1, 2, 3], [4]], max_tokens=[2, 2])
        while generator.next_generated():
            pass
        generator.close()
    assert (2, model.args.vocab_size) in shapes
