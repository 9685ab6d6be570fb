"""A fixed orthogonal rotation, which spreads a vector's energy evenly over its coordinates.

It is a randomised Hadamard transform: random signs, then butterflies, in float32. If the dimension is not a power of
two, there are two transforms of the largest power of two below it, one of the first and one of the last coordinates.
They overlap, so that energy spreads over all coordinates. Random signs come before each of them, because without them
the second would undo much of the first.

No dense matrix is stored or multiplied by. Butterflies rotate each vector alone, so the result does not depend on the
vectors beside it. That of a matrix product does, in the last bit, and so would the codes.

Source of the idea: Ailon and Chazelle, "The Fast Johnson-Lindenstrauss Transform" (2009).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map of vectors of ``dim`` coordinates. It depends on (dim, seed) alone and never changes.

    Raises ValueError for fewer than 2 coordinates.
    """

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dim < 2:
            raise ValueError(f"a rotation needs at least 2 dimensions, not {self.dim}")

    def forward(self, x: mx.array) -> mx.array:
        """Rotate x (..., dim), any float dtype; return float32."""
        y = x.astype(mx.float32)
        for start, signs in zip(self._block_starts(), self._signs(), strict=True):
            y = self._transform(y * signs, start)
        return y

    def inverse(self, y: mx.array) -> mx.array:
        """Rotate y (..., dim) back; return float32."""
        x = y.astype(mx.float32)
        for start, signs in zip(reversed(self._block_starts()), reversed(self._signs()), strict=True):
            x = self._transform(x, start) * signs
        return x

    @property
    def signs(self) -> mx.array:
        """Return the signs (dim,) that coordinates are multiplied by, if dim is a power of two."""
        (signs,) = self._signs()
        return signs

    def _signs(self) -> list[mx.array]:
        """Return a vector of signs (dim,) for each transform."""
        # NumPy guarantees that the raw bits of PCG64 never change; nothing else of its `random` is used.
        stages = len(self._block_starts())
        bits = np.random.PCG64([self.seed, self.dim]).random_raw((stages, self.dim)) >> np.uint64(63)
        return [mx.array(row) for row in 1.0 - 2.0 * bits.astype(np.float32)]

    def _block_starts(self) -> tuple[int, ...]:
        return (0,) if self._block == self.dim else (0, self.dim - self._block)

    @property
    def _block(self) -> int:
        return 1 << (self.dim.bit_length() - 1)

    def _transform(self, x: mx.array, start: int) -> mx.array:
        """Apply the normalised Hadamard transform, which is its own inverse, to coordinates start .. start + block."""
        if self._block == self.dim:
            return mx.hadamard_transform(x)
        stop = start + self._block
        middle = mx.hadamard_transform(mx.contiguous(x[..., start:stop]))
        return mx.concatenate([x[..., :start], middle, x[..., stop:]], axis=-1)
