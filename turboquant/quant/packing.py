"""b-bit codes to uint32 words and back, tight for every supported b.

Knows integers only. A width is split into planes whose own widths divide 32 (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2),
so no code straddles two words and unpacking is one shift and one mask a plane, on any backend. The planes of a
vector follow each other, the one with the low bits first; within a plane, coordinate i has the bits from
``i * width`` on, low bits first. A plane that does not fill its last word is padded with zeros.
"""

from __future__ import annotations

import mlx.core as mx

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def packed_words(dim: int, bits: int) -> int:
    """How many uint32 words hold ``dim`` codes of ``bits`` bits: ``dim * bits / 32`` wherever 32 divides ``dim``."""
    return sum(_plane_words(dim, width) for width in PLANES[bits])


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes (..., dim), any unsigned dtype, values below ``2**bits``, into words (..., packed_words) uint32."""
    codes = codes.astype(mx.uint32)
    planes, shift = [], 0
    for width in PLANES[bits]:
        plane = (codes >> shift) & (2**width - 1)
        planes.append(_pack_plane(plane, width))
        shift += width
    return planes[0] if len(planes) == 1 else mx.concatenate(planes, axis=-1)


def unpack(words: mx.array, bits: int, dim: int) -> mx.array:
    """The inverse of ``pack``: words (..., packed_words) uint32 to codes (..., dim) uint32."""
    codes, shift, start = None, 0, 0
    for width in PLANES[bits]:
        count = _plane_words(dim, width)
        plane = _unpack_plane(words[..., start : start + count], width, dim)
        codes = plane if codes is None else codes | (plane << shift)
        shift, start = shift + width, start + count
    assert codes is not None
    return codes


def _plane_words(dim: int, width: int) -> int:
    return -(-dim * width // 32)


def _pack_plane(plane: mx.array, width: int) -> mx.array:
    per_word, dim = 32 // width, plane.shape[-1]
    padding = -dim % per_word
    if padding:
        plane = mx.pad(plane, [(0, 0)] * (plane.ndim - 1) + [(0, padding)])
    grouped = plane.reshape(*plane.shape[:-1], -1, per_word)
    return (grouped << _shifts(width)).sum(axis=-1)  # the bits are disjoint, so the sum is their union


def _unpack_plane(words: mx.array, width: int, dim: int) -> mx.array:
    fields = (words[..., None] >> _shifts(width)) & (2**width - 1)
    codes: mx.array = fields.reshape(*words.shape[:-1], -1)[..., :dim]
    return codes


def _shifts(width: int) -> mx.array:
    return mx.arange(0, 32, width, dtype=mx.uint32)
