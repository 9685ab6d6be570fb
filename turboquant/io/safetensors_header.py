"""Read the header of a safetensors file, which may be damaged or forged, and check it against the file's size.

This module needs neither MLX nor NumPy, so that a caller who checks files only does not wait for their import.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from turboquant.io.json_file import parse_json

_DTYPES_BY_BYTES = {1: "BOOL U8 I8", 2: "U16 I16 F16 BF16", 4: "U32 I32 F32", 8: "U64 I64"}
DTYPE_BYTES = {dtype: size for size, dtypes in _DTYPES_BY_BYTES.items() for dtype in dtypes.split()}
LARGEST_HEADER = 16 << 20
MOST_OF_EMPTY = 1 << 24  # elements that an empty tensor would have if its dimensions of 0 were 1


@dataclass(frozen=True)
class Stored:
    """The dtype and shape of a tensor in a file, and its place: bytes ``start`` to ``stop``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: BinaryIO, any_dtype: bool = False) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and its metadata.

    MLX believes any header, so it must be given only files that passed this check.

    any_dtype: also accept tensors whose dtype is not in ``DTYPE_BYTES``, without comparing length and shape.

    Raises ValueError unless each tensor has a known dtype and the length that its shape implies, and all tensors
    together fill the file without gaps.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is not a mapping")
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null where there is no metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the header's metadata is not a mapping of text")
    tensors = {name: _parse_entry(name, entry, 8 + length, any_dtype) for name, entry in header.items()}
    end = 8 + length
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.stop)):
        if stored.start != end:
            raise ValueError("the tensors overlap, or there are gaps between them")
        end = stored.stop
    if end != size:
        raise ValueError(f"the tensors end at byte {end}, and the file has {size} bytes")
    return tensors, metadata


def _parse_entry(name: str, entry: Any, data: int, any_dtype: bool) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of tensor {name!r} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > 8 or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has no valid shape or offsets")
    if 0 in shape and math.prod(filter(None, shape)) > MOST_OF_EMPTY:
        raise ValueError(f"tensor {name!r} is empty, and its other dimensions are too large")
    if offsets[1] < offsets[0]:
        raise ValueError(f"tensor {name!r} ends before it begins")
    if not any_dtype:
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise ValueError(f"tensor {name!r} does not have the length that its shape implies")
    return Stored(str(dtype), tuple(shape), data + offsets[0], data + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
