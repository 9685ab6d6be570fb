"""The scalar quantiser of N(0, 1) has the error and the properties that Lloyd and Max prove."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from turboquant.quant import SUPPORTED_BITS
from turboquant.quant.codebook import Codebook, lloyd_max

GRID = np.linspace(-12.0, 12.0, 2_000_001)
WEIGHTS = np.exp(-(GRID**2) / 2) / math.sqrt(2 * math.pi) * (GRID[1] - GRID[0])


def cells(codebook: Codebook) -> NDArray[np.int64]:
    return np.searchsorted(codebook.boundaries.astype(np.float64), GRID)


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1175), (3, 0.03455), (4, 0.0095), (5, 0.0025)])
def test_the_error_is_the_one_in_the_tables_of_max(bits: int, expected: float) -> None:
    codebook = lloyd_max(bits)
    error = np.sum(WEIGHTS * (GRID - codebook.levels[cells(codebook)]) ** 2)
    assert error == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_the_error_falls_by_close_to_six_decibels_a_bit(bits: int) -> None:
    codebook = lloyd_max(bits)
    error = np.sum(WEIGHTS * (GRID - codebook.levels[cells(codebook)]) ** 2)
    panter_dite = math.sqrt(3) * math.pi / 2 * 4.0**-bits  # the limit for many levels; fewer levels have less
    assert 0.6 * panter_dite < error < panter_dite


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_each_level_is_the_centroid_of_its_cell(bits: int) -> None:
    codebook = lloyd_max(bits)
    cell = cells(codebook)
    mass = np.bincount(cell, WEIGHTS, 2**bits)
    centroids = np.bincount(cell, WEIGHTS * GRID, 2**bits) / mass
    np.testing.assert_allclose(codebook.levels, centroids, atol=2e-4)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_levels_ascend_symmetrically_with_boundaries_halfway(bits: int) -> None:
    codebook = lloyd_max(bits)
    assert codebook.levels.shape == (2**bits,)
    assert np.all(np.diff(codebook.levels) > 0)
    np.testing.assert_array_equal(codebook.levels, -codebook.levels[::-1])
    np.testing.assert_allclose(codebook.boundaries, (codebook.levels[1:] + codebook.levels[:-1]) / 2, atol=1e-6)


def test_a_codebook_cannot_be_changed_by_its_users() -> None:
    with pytest.raises(ValueError, match="read-only"):
        lloyd_max(4).levels[0] = 0


@pytest.mark.parametrize("bits", [-1, 0, 1, 7, 9, 16])
def test_other_numbers_of_bits_are_refused_by_name(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits are not supported; use one of 2, 3, 4, 5, 6, 8"):
        lloyd_max(bits)
