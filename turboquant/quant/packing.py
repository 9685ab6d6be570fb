"""Pack b-bit codes into uint32 words without gaps, and unpack them.

The bits of a code are split into planes whose widths divide 32 (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2). So no part of a code
lies in two words, and unpacking takes one shift and one mask per plane on any backend. The planes of a vector follow
each other, the one with the low bits first. Within a plane, coordinate i has the bits from ``i * width`` on, low bits
first. The last word of a plane is padded with zeros.
"""

from __future__ import annotations

import mlx.core as mx

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def packed_words(dim: int, bits: int) -> int:
    """Count the uint32 words of ``dim`` codes of ``bits`` bits: ``dim * bits / 32`` if 32 divides ``dim``."""
    return sum(_plane_words(dim, width) for width in PLANES[bits])


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes (..., dim), any unsigned dtype, values below ``2**bits``, into words (..., packed_words), uint32."""
    codes = codes.astype(mx.uint32)
    planes, shift = [], 0
    for width in PLANES[bits]:
        plane, per_word = (codes >> shift) & (2**width - 1), 32 // width
        if padding := -plane.shape[-1] % per_word:
            plane = mx.pad(plane, [(0, 0)] * (plane.ndim - 1) + [(0, padding)])
        grouped = plane.reshape(*plane.shape[:-1], -1, per_word)
        planes.append((grouped << _shifts(width)).sum(axis=-1))  # the bits are disjoint, so the sum is their union
        shift += width
    return planes[0] if len(planes) == 1 else mx.concatenate(planes, axis=-1)


def unpack(words: mx.array, bits: int, dim: int) -> mx.array:
    """Unpack words (..., packed_words), uint32, into codes (..., dim), uint32."""
    codes: mx.array | None = None
    shift = start = 0
    for width in PLANES[bits]:
        count = _plane_words(dim, width)
        fields = (words[..., start : start + count, None] >> _shifts(width)) & (2**width - 1)
        plane: mx.array = fields.reshape(*words.shape[:-1], -1)[..., :dim]
        codes = plane if codes is None else codes | (plane << shift)
        shift, start = shift + width, start + count
    assert codes is not None
    return codes


def _plane_words(dim: int, width: int) -> int:
    return -(-dim * width // 32)


def _shifts(width: int) -> mx.array:
    return mx.arange(0, 32, width, dtype=mx.uint32)
