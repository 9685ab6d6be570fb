"""The TurboQuant codec: rotate a vector, normalise it, quantise each coordinate, and keep one scale per vector.

``Codec`` compresses vectors of one size to one number of bits. Which codec keys and values get is decided in
cache_codec.py.

Source: Zandieh et al., "TurboQuant" (arXiv 2504.19874), without its QJL residual. Three things are added here. The
scale restores the norm that quantisation loses. A mean can be given, which is subtracted from those vectors that it
makes shorter. Codes can be chosen to suit the queries of the context (rounding.py).
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
from turboquant.runtime.device import array_module, as_float32, fused
from turboquant.runtime.threads import run_in_parallel

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0  # float16's smallest and largest positive number


@dataclass(frozen=True)
class Encoded:
    """Compressed vectors.

    codes: (..., packed_words) uint32, see packing.py; of blocks of vectors if they are trellis codes, see trellis.py.
    scales: (...) float16. The magnitude multiplies the decoded levels. The sign is positive if the mean was
        subtracted from the vector before it was encoded, and negative if not.
    """

    codes: mx.array
    scales: mx.array

    @property
    def nbytes(self) -> int:
        """Count the bytes of codes and scales."""
        return int(self.codes.nbytes + self.scales.nbytes)

    @property
    def tokens(self) -> int:
        """Count the vectors along the last axis of ``scales``; for keys and values these are the tokens."""
        return int(self.scales.shape[-1])

    def slice_tokens(self, start: int, stop: int) -> Encoded:
        """Return the encoded tokens start .. stop, without copying.

        Trellis codes are those of whole blocks, so 128 must divide start and, except at the end, stop.
        """
        return Encoded(self.codes[..., start:stop, :], self.scales[..., start:stop])

    @staticmethod
    def concatenate(parts: Sequence[Encoded]) -> Encoded:
        """Join parts along the token axis."""
        return Encoded(
            mx.concatenate([part.codes for part in parts], axis=-2),
            mx.concatenate([part.scales for part in parts], axis=-1),
        )


@dataclass(frozen=True)
class Codec:
    """Compress float vectors of ``head_dim`` coordinates to ``bits`` bits per coordinate and two bytes per vector.

    A vector gets the same codes whichever vectors are encoded with it. Raises ValueError for bits that are not in
    ``SUPPORTED_BITS``, and for fewer than 2 coordinates.

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
        """Return the rotation that is applied before a vector is quantised."""
        return Rotation(self.head_dim, self.seed)

    @property
    def words(self) -> int:
        """Count the uint32 words that the codes of a vector take."""
        return packed_words(self.head_dim, self.bits)

    @property
    def effective_bits(self) -> float:
        """Count the bits per coordinate, with those of the scale."""
        return (32 * self.words + 16) / self.head_dim

    def rounding_metric(self, metric: Any, kernel: Callable[[Any], Any] | None = None) -> RoundingMetric:
        """Prepare a metric for ``encode``: rotate it, and compute what rounding needs of it.

        metric: (H, head_dim, head_dim) in the basis of the vectors that are encoded, an array of
            ``device.array_module``: float64 of NumPy, or float32 of MLX.
        kernel: see ``RoundingMetric.prepare``.
        """
        return RoundingMetric.prepare(array_module(), self._rotated(metric), kernel)

    def _rotated(self, metric: Any) -> Any:
        if array_module() is np:
            basis = _basis(self.rotation)
            return basis.T @ metric @ basis
        half = self.rotation.forward(metric).swapaxes(1, 2)  # a matrix product on a GPU may round to 10 bits
        return self.rotation.forward(half)

    def encode(self, x: mx.array, mean: mx.array | None = None, metric: RoundingMetric | None = None) -> Encoded:
        """Compress x (..., head_dim), any float dtype.

        mean: broadcastable to x; subtracted from each vector that it makes shorter. ``decode`` needs the same mean.
        metric: made by ``rounding_metric``, for x (H, T, head_dim). Codes are then chosen so that the error is small
            in this metric. Without it each coordinate gets the nearest level.
        Raises ValueError if the last axis is not head_dim.
        """
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"vectors of {x.shape[-1]} coordinates given to a codec for {self.head_dim}")
        if x.size == 0:  # several of MLX's operations refuse empty arrays
            return Encoded(mx.zeros((*x.shape[:-1], self.words), mx.uint32), mx.zeros(x.shape[:-1], mx.float16))
        unit, norm, is_centred = self.normalise(x, mean)
        if metric is None:
            codes = nearest_levels(self.bits)(unit)
            factors = math.sqrt(self.head_dim) / _norm(self._look_up(codes))  # restore each vector's norm
        else:
            codes, factors = self._round_in_metric(unit, metric)
        return Encoded(pack(codes, self.bits), signed_scales(norm * factors, is_centred))

    def normalise(self, x: mx.array, mean: mx.array | None) -> tuple[mx.array, mx.array, mx.array | None]:
        """Centre and rotate vectors (..., head_dim) for quantisation.

        Returns them with a norm of sqrt(head_dim), (..., head_dim) float32; their norms before, divided by that, (...);
        and from which the mean was subtracted, (...) bool, or None without a mean.
        """
        x, is_centred = x.astype(mx.float32), None
        if mean is not None:
            centred = x - mean
            is_centred = _norm(centred) < _norm(x)
            x = mx.where(is_centred[..., None], centred, x)
        norm = _norm(x) / math.sqrt(self.head_dim)
        return self.rotation.forward(x) / mx.maximum(norm, 1e-30)[..., None], norm, is_centred

    def decode(self, encoded: Encoded, mean: mx.array | None = None, dtype: mx.Dtype = mx.float32) -> mx.array:
        """Reconstruct vectors (..., head_dim) in ``dtype``; mean: the one that ``encode`` was given."""
        if encoded.scales.size == 0:
            return mx.zeros((*encoded.scales.shape, self.head_dim), dtype)
        x = self.rotation.inverse(self.decode_rotated(encoded))
        if mean is not None:
            x = x + mx.where((encoded.scales > 0)[..., None], mean, 0.0)
        return x.astype(dtype)

    def decode_rotated(self, encoded: Encoded) -> mx.array:
        """Reconstruct vectors (..., head_dim) float32 in the rotated basis, without adding the mean."""
        levels = self._look_up(unpack(encoded.codes, self.bits, self.head_dim))
        return levels * mx.abs(encoded.scales.astype(mx.float32))[..., None]

    @property
    def levels(self) -> mx.array:
        """Return the codebook's levels, (2**bits,) float32."""
        return mx.array(lloyd_max(self.bits).levels)

    def _look_up(self, codes: mx.array) -> mx.array:
        """Return the levels, float32, of codes. On a CPU, NumPy looks them up seven times as fast as MLX."""
        if array_module() is np:
            return mx.array(lloyd_max(self.bits).levels.take(np.asarray(codes)))
        return self.levels[codes]

    def _round_in_metric(self, unit: mx.array, metric: RoundingMetric) -> tuple[mx.array, mx.array]:
        """Choose codes (H, T, head_dim) and factors (H, T) for rotated vectors of norm sqrt(head_dim)."""
        xp = array_module()
        coordinates = as_float32(xp, mx.contiguous(unit.swapaxes(1, 2)))

        def round_heads(some: slice) -> tuple[Any, Any]:
            return round_in_metric(xp, coordinates[some], metric.slice_heads(some), self.bits)

        heads = [slice(head, head + 1) for head in range(unit.shape[0])] if xp is np else [slice(None)]
        codes, factors = (xp.concatenate(parts) for parts in zip(*run_in_parallel(round_heads, heads), strict=True))
        return mx.array(codes).swapaxes(1, 2), mx.array(factors)


@functools.lru_cache(maxsize=16)
def _basis(rotation: Rotation) -> NDArray[np.float64]:
    """Return the rotation as a matrix (dim, dim); row i is the rotated unit vector of coordinate i."""
    return np.array(rotation.forward(mx.eye(rotation.dim)), np.float64)


def signed_scales(scales: mx.array, is_centred: mx.array | None) -> mx.array:
    """Return scales as ``Encoded`` has them: float16, negative for vectors whose mean was not subtracted."""
    scales = mx.clip(scales, SMALLEST_SCALE, LARGEST_SCALE)
    return (-scales if is_centred is None else mx.where(is_centred, scales, -scales)).astype(mx.float16)


def _norm(x: mx.array) -> mx.array:
    return mx.sqrt(mx.square(x).sum(axis=-1))


@functools.cache
def nearest_levels(bits: int) -> Callable[[mx.array], mx.array]:
    """Return a function that gives the code, uint32, of the level nearest to each coordinate.

    It compares with each boundary if there are few, and searches in halves if there are many; each is faster there.
    """
    boundaries = [float(b) for b in lloyd_max(bits).boundaries]
    if len(boundaries) > 31:

        def search(unit: mx.array) -> mx.array:
            table, codes = mx.array(boundaries), mx.zeros(unit.shape, mx.uint32)
            for step in (128, 64, 32, 16, 8, 4, 2, 1):
                if step <= len(boundaries):
                    codes = mx.where(unit > table[codes + (step - 1)], codes + step, codes)
            return codes

        return search

    @fused
    def count_boundaries(unit: mx.array) -> mx.array:
        codes = (unit > boundaries[0]).astype(mx.uint8)
        for boundary in boundaries[1:]:
            codes = codes + (unit > boundary)
        return codes.astype(mx.uint32)

    return count_boundaries
