"""The TurboQuant codec: rotate, normalise, quantise each coordinate, keep one scale a vector.

``Codec`` knows vectors of one size at one number of bits. ``CacheCodec`` knows how a layer's keys and values are
treated: their bits, and which tokens are kept as they are. Neither knows attention, files or mlx-lm.

Source: Zandieh et al., "TurboQuant" (arXiv 2504.19874), without its QJL residual. Added here: the scale makes up
for the norm that quantisation loses, a given mean is left out of the vectors that are shorter without it, and codes
may be chosen by the queries they will meet (rounding.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.quant.codebook import lloyd_max
from turboquant.quant.packing import pack, packed_words, unpack
from turboquant.quant.rotation import Rotation
from turboquant.quant.rounding import RoundingMetric, round_in_metric
from turboquant.runtime.device import array_module, fused, to_module
from turboquant.runtime.threads import run_in_parallel

SMALLEST_SCALE = 2.0**-24  # float16's smallest positive number
LARGEST_SCALE = 65504.0  # and its largest


@dataclass(frozen=True)
class Encoded:
    """Compressed vectors.

    codes: (..., packed_words) uint32, see packing.py.
    scales: (...) float16. The magnitude multiplies the decoded levels. The sign is positive where the mean was
        removed from the vector before encoding, negative where the vector was encoded as it was.
    """

    codes: mx.array
    scales: mx.array

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return int(self.codes.nbytes + self.scales.nbytes)

    @property
    def tokens(self) -> int:
        """The length of the last axis but one of the encoded array: of keys and values, the tokens."""
        return int(self.scales.shape[-1])

    def slice_tokens(self, start: int, stop: int) -> Encoded:
        """The encoded tokens start .. stop, without copying."""
        return Encoded(self.codes[..., start:stop, :], self.scales[..., start:stop])

    @staticmethod
    def concatenate(parts: Sequence[Encoded]) -> Encoded:
        """The parts one behind the other along the token axis."""
        return Encoded(
            mx.concatenate([part.codes for part in parts], axis=-2),
            mx.concatenate([part.scales for part in parts], axis=-1),
        )


@dataclass(frozen=True)
class Codec:
    """Compresses float vectors of ``head_dim`` coordinates to ``bits`` bits a coordinate and two bytes a vector.

    Encoding a vector gives the same bits whatever is encoded with it.

    >>> x = mx.random.normal((2, 100, 128))
    >>> codec = Codec(head_dim=128, bits=4)
    >>> encoded = codec.encode(x)
    >>> encoded.nbytes == 2 * 100 * (128 * 4 // 8 + 2)
    True
    >>> float(mx.square(codec.decode(encoded) - x).mean()) < 0.0097
    True
    """

    head_dim: int
    bits: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        lloyd_max(self.bits)  # raises for bits that are not supported
        Rotation(self.head_dim, self.seed)

    @property
    def rotation(self) -> Rotation:
        """The rotation in whose basis the codes are."""
        return Rotation(self.head_dim, self.seed)

    @property
    def words(self) -> int:
        """uint32 words a vector."""
        return packed_words(self.head_dim, self.bits)

    @property
    def effective_bits(self) -> float:
        """Bits a coordinate with the scale counted."""
        return (32 * self.words + 16) / self.head_dim

    def rounding_metric(self, metric: Any, kernel: Callable[[Any], Any] | None = None) -> RoundingMetric:
        """A metric (H, head_dim, head_dim) of vectors as they are given to ``encode``, made ready for it.

        It is of ``device.array_module``: float64 of NumPy's, else float32. kernel: see ``RoundingMetric.of``.
        """
        xp = array_module()
        if xp is np:
            basis = _basis(self.rotation)
            return RoundingMetric.of(np, basis.T @ metric @ basis, kernel)
        half = self.rotation.forward(metric).swapaxes(1, 2)  # a product might round to 10 bits, and the metric with it
        return RoundingMetric.of(mx, self.rotation.forward(half), kernel)

    def encode(self, x: mx.array, mean: mx.array | None = None, metric: RoundingMetric | None = None) -> Encoded:
        """Compress x (..., head_dim), any float dtype.

        mean: broadcastable to x; removed from each vector that is shorter without it. The same mean must be given
        to ``decode``.
        metric: of ``rounding_metric``, for x (H, T, head_dim); codes are then chosen so that the error is small in
        it, and else the nearest to each coordinate.
        Raises ValueError where the last axis is not head_dim.
        """
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"vectors of {x.shape[-1]} coordinates given to a codec for {self.head_dim}")
        if x.size == 0:  # several of MLX's operations refuse empty arrays
            return Encoded(mx.zeros((*x.shape[:-1], self.words), mx.uint32), mx.zeros(x.shape[:-1], mx.float16))
        x = x.astype(mx.float32)
        removed = None
        if mean is not None:
            centred = x - mean
            removed = _norm(centred) < _norm(x)
            x = mx.where(removed[..., None], centred, x)
        norm = _norm(x) / math.sqrt(self.head_dim)
        unit = self.rotation.forward(x) / mx.maximum(norm, 1e-30)[..., None]
        codes, factors = self._nearest(unit) if metric is None else self._round_in_metric(unit, metric)
        scales = mx.clip(norm * factors, SMALLEST_SCALE, LARGEST_SCALE)
        scales = -scales if removed is None else mx.where(removed, scales, -scales)
        return Encoded(pack(codes, self.bits), scales.astype(mx.float16))

    def decode(self, encoded: Encoded, mean: mx.array | None = None, dtype: mx.Dtype = mx.float32) -> mx.array:
        """Reconstruct (..., head_dim) in ``dtype`` from what ``encode`` made with the same mean."""
        if encoded.scales.size == 0:
            return mx.zeros((*encoded.scales.shape, self.head_dim), dtype)
        x = self.rotation.inverse(self.decode_rotated(encoded))
        if mean is not None:
            x = x + mx.where((encoded.scales > 0)[..., None], mean, 0.0)
        return x.astype(dtype)

    def decode_rotated(self, encoded: Encoded) -> mx.array:
        """Reconstruct (..., head_dim) float32 in the rotated basis, the mean still left out."""
        levels = self.levels[unpack(encoded.codes, self.bits, self.head_dim)]
        return levels * mx.abs(encoded.scales.astype(mx.float32))[..., None]

    @property
    def levels(self) -> mx.array:
        """The codebook's levels, (2**bits,) float32."""
        return mx.array(lloyd_max(self.bits).levels)

    def _nearest(self, unit: mx.array) -> tuple[mx.array, mx.array]:
        """The index of the nearest level for every coordinate, and what restores each vector's norm."""
        codes = _nearest_level(self.bits)(unit)
        return codes, math.sqrt(self.head_dim) / _norm(self.levels[codes])

    def _round_in_metric(self, unit: mx.array, metric: RoundingMetric) -> tuple[mx.array, mx.array]:
        xp = array_module()
        coordinates = to_module(xp, mx.contiguous(unit.swapaxes(1, 2)))

        def rounded(some: slice) -> tuple[Any, Any]:
            return round_in_metric(xp, coordinates[some], metric.of_heads(some), self.bits)

        heads = [slice(head, head + 1) for head in range(unit.shape[0])] if xp is np else [slice(None)]
        codes, factors = (xp.concatenate(parts) for parts in zip(*run_in_parallel(rounded, heads), strict=True))
        return mx.array(codes).swapaxes(1, 2), mx.array(factors)


@functools.lru_cache(maxsize=16)
def _basis(rotation: Rotation) -> NDArray[np.float64]:
    """The rotation as a matrix; row i: what coordinate i becomes."""
    return np.array(rotation.forward(mx.eye(rotation.dim)), np.float64)


def _norm(x: mx.array) -> mx.array:
    return mx.sqrt(mx.square(x).sum(axis=-1))


@functools.cache
def _nearest_level(bits: int) -> Callable[[mx.array], mx.array]:
    """What gives the code of each coordinate: a comparison a boundary is fastest for few, a binary search for many."""
    boundaries = [float(b) for b in lloyd_max(bits).boundaries]
    if len(boundaries) > 31:
        return lambda unit: _binary_search(unit, mx.array(boundaries))

    @fused
    def count_boundaries(unit: mx.array) -> mx.array:
        codes = (unit > boundaries[0]).astype(mx.uint8)
        for boundary in boundaries[1:]:
            codes = codes + (unit > boundary)
        return codes.astype(mx.uint32)

    return count_boundaries


def _binary_search(x: mx.array, boundaries: mx.array) -> mx.array:
    codes = mx.zeros(x.shape, mx.uint32)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        if step <= boundaries.shape[0]:
            codes = mx.where(x > boundaries[codes + (step - 1)], codes + step, codes)
    return codes
