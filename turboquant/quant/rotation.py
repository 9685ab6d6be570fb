"""The fixed orthogonal rotation that spreads a vector's energy evenly over its coordinates.

Knows a dimension and a seed. It is a randomised Hadamard transform: random signs, then butterflies, in float32.
A dimension that is no power of two gets two transforms of the largest power of two below it, one over its first
and one over its last coordinates; they overlap, so that energy spreads over all, and random signs come before each,
for without them the second would undo much of the first. There is no dense matrix to store or to multiply by, and
since butterflies work on each vector alone, a vector's rotation does not depend on which others are rotated with
it: a matrix product's would, in the last bit, and with it the codes.

Source of the idea: Ailon and Chazelle, "The Fast Johnson-Lindenstrauss Transform" (2009).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map of vectors of ``dim`` coordinates, the same for ever for one (dim, seed)."""

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dim < 2:
            raise ValueError(f"a rotation needs at least 2 dimensions, not {self.dim}")

    def forward(self, x: mx.array) -> mx.array:
        """Rotate x (..., dim), any float dtype; returns float32."""
        y = x.astype(mx.float32)
        for start, signs in zip(self._block_starts(), self._signs(), strict=True):
            y = self._transform(y * signs, start)
        return y

    def inverse(self, y: mx.array) -> mx.array:
        """Undo ``forward``: y (..., dim) to float32 (..., dim)."""
        x = y.astype(mx.float32)
        for start, signs in zip(reversed(self._block_starts()), reversed(self._signs()), strict=True):
            x = self._transform(x, start) * signs
        return x

    @property
    def signs(self) -> mx.array:
        """(dim,) what coordinates are multiplied by before the transform, where dim is a power of two."""
        (signs,) = self._signs()
        return signs

    def _signs(self) -> list[mx.array]:
        """One vector of signs for each transform."""
        # PCG64 is pinned by NumPy's stream compatibility policy; `random` itself is not used beyond raw bits.
        stages = len(self._block_starts())
        bits = np.random.PCG64([self.seed, self.dim]).random_raw((stages, self.dim)) >> np.uint64(63)
        return [mx.array(row) for row in 1.0 - 2.0 * bits.astype(np.float32)]

    def _block_starts(self) -> tuple[int, ...]:
        return (0,) if self._block == self.dim else (0, self.dim - self._block)

    @property
    def _block(self) -> int:
        return 1 << (self.dim.bit_length() - 1)

    def _transform(self, x: mx.array, start: int) -> mx.array:
        """The normalised Hadamard transform, its own inverse, of coordinates start .. start + block."""
        if self._block == self.dim:
            return mx.hadamard_transform(x)
        stop = start + self._block
        middle = mx.hadamard_transform(mx.contiguous(x[..., start:stop]))
        return mx.concatenate([x[..., :start], middle, x[..., stop:]], axis=-1)
