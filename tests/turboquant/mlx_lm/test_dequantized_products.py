"""Products of many rows with a dequantised matrix equal MLX's, and take their place only where they may."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant.mlx_lm import dequantized_products as products

STOCK = mx.quantized_matmul


def quantized(bits: int = 4, mode: str = "affine") -> tuple[list[mx.array], dict[str, Any]]:
    options: dict[str, Any] = {"group_size": 32, "bits": bits, "mode": mode}
    matrix = mx.random.normal((96, 64), key=mx.random.key(0)).astype(mx.float16)
    return list(mx.quantize(matrix, **options)), options


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("shape", [(1, 300, 64), (2, 128, 64), (1, 255, 64), (5, 64)])
def test_products_equal_mlx_s(shape: tuple[int, ...], bits: int) -> None:
    matrix, options = quantized(bits)
    x = mx.random.normal(shape, key=mx.random.key(1)).astype(mx.float16)
    found = products.quantized_matmul(x, *matrix, transpose=True, **options)
    expected = STOCK(x, *matrix, transpose=True, **options)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-2, atol=5e-2)


def test_what_has_no_biases_or_is_no_single_matrix_is_mlx_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "dequantize", lambda *_, **__: pytest.fail("dequantised"))
    (matrix, scales), options = quantized(mode="mxfp4")
    x = mx.ones((1, 300, 64), mx.float16)
    assert products.quantized_matmul(x, matrix, scales, transpose=True, **options).shape == (1, 300, 96)
    affine, options = quantized()
    assert products.quantized_matmul(mx.ones((1, 300, 96), mx.float16), *affine, False, **options).shape[-1] == 64
    stacked = [part[None] for part in affine]
    assert products.quantized_matmul(x, *stacked, transpose=True, **options).shape == (1, 300, 96)
    assert products.quantized_matmul(x.astype(mx.float32), *affine, transpose=True, **options).shape == (1, 300, 96)


@pytest.mark.parametrize("family", ["cpu", "metal", "cuda"])
def test_mlx_s_function_is_replaced_on_cuda_alone_and_put_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "device_family", lambda: family)
    with products.dequantized_products():
        assert (mx.quantized_matmul is STOCK) == (family != "cuda")
    assert mx.quantized_matmul is STOCK
