"""The rotation is orthogonal, can be undone, never changes, and treats each vector alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant.quant.rotation import Rotation

GOLDEN = {
    64: [-37.0, -80.0, 6.5, -41.5],
    80: [-25.5, 1.5, 3.0, 26.0],
    96: [-28.25, -68.25, -13.75, 110.25],
}  # the first coordinates of the rotated vector 0, 1, 2, ..
DIMS = [2, 3, 63, 64, 72, 80, 96, 128, 255, 256]


@pytest.mark.parametrize("dim", DIMS)
def test_the_rotation_is_orthogonal(dim: int) -> None:
    matrix = np.array(Rotation(dim).forward(mx.eye(dim)), dtype=np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(dim=st.integers(2, 300), seed=st.integers(0, 2**32), count=st.integers(1, 5))
def test_inverse_undoes_forward_and_norms_are_kept(dim: int, seed: int, count: int) -> None:
    x = mx.random.normal((count, dim), key=mx.random.key(seed))
    rotation = Rotation(dim, seed)
    rotated = rotation.forward(x)
    np.testing.assert_allclose(np.array(rotation.inverse(rotated)), np.array(x), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(np.array(rotated), axis=-1), np.linalg.norm(np.array(x), axis=-1), 1e-5)


@pytest.mark.parametrize("dim", DIMS)
def test_a_vector_s_rotation_does_not_depend_on_its_neighbours(dim: int) -> None:
    rotation = Rotation(dim)
    x = mx.random.normal((2, 33, dim))
    together = rotation.forward(x)
    strided = rotation.forward(mx.contiguous(x.swapaxes(0, 1)).swapaxes(0, 1))
    assert mx.array_equal(together, strided)
    for i in range(33):
        assert mx.array_equal(together[0, i], rotation.forward(x[0, i]))
        assert mx.array_equal(together[:, i : i + 1], rotation.forward(x[:, i : i + 1]))


@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128, 192, 256])
def test_a_large_coordinate_is_spread_as_well_as_by_a_random_rotation(dim: int) -> None:
    rotated = np.array(Rotation(dim).forward(mx.eye(dim))) * np.sqrt(dim)
    assert np.abs(rotated).max() < 5
    assert (rotated**4).mean(axis=1).max() < 6  # 3 for N(0, 1), dim without a rotation


def test_only_the_seed_decides() -> None:
    x = mx.random.normal((4, 80))
    assert mx.array_equal(Rotation(80, 3).forward(x), Rotation(80, 3).forward(x))
    assert not mx.array_equal(Rotation(80, 3).forward(x), Rotation(80, 4).forward(x))


def test_the_rotation_never_changes_because_files_depend_on_it() -> None:
    for dim, golden in GOLDEN.items():
        rotated = np.array(Rotation(dim, 0).forward(mx.arange(dim)))
        np.testing.assert_allclose(rotated[:4], golden, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_rotated_as_float32(dtype: mx.Dtype) -> None:
    x = mx.random.normal((3, 64)).astype(dtype)
    assert Rotation(64).forward(x).dtype == mx.float32
    assert mx.array_equal(Rotation(64).forward(x), Rotation(64).forward(x.astype(mx.float32)))


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_fewer_than_two_dimensions_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        Rotation(dim)
