"""Lloyd-Max scalar quantisers for the standard normal distribution N(0, 1).

After a random rotation the coordinates of a normalised vector are close to N(0, 1), so all of them have one codebook.

Sources: J. Max, "Quantizing for Minimum Distortion" (1960); S. Lloyd, "Least Squares Quantization in PCM" (1982).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turboquant.quant import SUPPORTED_BITS


@dataclass(frozen=True)
class Codebook:
    """The quantiser of N(0, 1) with the least mean squared error at ``bits`` bits.

    levels: (2**bits,) float32, ascending, symmetric about 0.
    boundaries: (2**bits - 1,) float32, the midpoints between neighbouring levels.
    """

    bits: int
    levels: NDArray[np.float32]
    boundaries: NDArray[np.float32]


@functools.cache
def lloyd_max(bits: int) -> Codebook:
    """Return the Lloyd-Max codebook for ``bits``. Raises ValueError if they are not in ``SUPPORTED_BITS``.

    >>> [round(float(x), 4) for x in lloyd_max(2).levels]
    [-1.5104, -0.4528, 0.4528, 1.5104]
    """
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"{bits} bits are not supported; use one of {', '.join(map(str, SUPPORTED_BITS))}")
    positive = _solve_positive_levels(2 ** (bits - 1))
    levels = np.concatenate([-positive[::-1], positive])
    boundaries = (levels[1:] + levels[:-1]) / 2
    codebook = Codebook(bits, levels.astype(np.float32), boundaries.astype(np.float32))
    codebook.levels.setflags(write=False)
    codebook.boundaries.setflags(write=False)
    return codebook


def _solve_positive_levels(count: int) -> NDArray[np.float64]:
    """Solve "each level is the centroid of its cell" for the ``count`` positive levels, by Newton's method.

    Lloyd's own iteration needs thousands of rounds at 8 bits, Newton's method ten. Its Jacobian is tridiagonal here.
    It starts close to the optimum, where the density of levels is proportional to the cube root of that of the
    distribution (Panter and Dite).
    """
    grid = np.linspace(0.0, 12.0, 20_001)
    cumulative = np.cumsum(np.exp(-(grid**2) / 6))
    levels = np.interp((np.arange(count) + 0.5) / count, cumulative / cumulative[-1], grid)
    for _ in range(100):
        lower = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2])
        upper = np.concatenate([lower[1:], [np.inf]])
        density_lower, density_upper = _density(lower), _density(upper)
        mass = _tail(lower) - _tail(upper)
        centroid = (density_lower - density_upper) / mass
        by_lower = density_lower * (centroid - lower) / mass
        by_upper = np.zeros(count)
        by_upper[:-1] = density_upper[:-1] * (upper - centroid)[:-1] / mass[:-1]
        by_lower[0] = 0.0  # the first cell's lower boundary is fixed at 0
        jacobian = np.diag(1 - (by_lower + by_upper) / 2)
        jacobian -= np.diag(by_lower[1:] / 2, -1) + np.diag(by_upper[:-1] / 2, 1)
        step = np.linalg.solve(jacobian, levels - centroid)
        levels = levels - step
        # The limit is far below float32's precision, but above the rounding errors of the tail masses.
        if np.max(np.abs(step)) < 1e-10:
            return levels
    raise ArithmeticError(f"the Lloyd-Max levels for {2 * count} cells did not converge")


def _density(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def _tail(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in x])
