"""Write and read the tensors of safetensors files, with checksums of their bytes.

Files that are read may be damaged or forged. The functions that read raise ValueError with a short reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import BinaryIO

import mlx.core as mx
import numpy as np
import xxhash

from turboquant.io.safetensors_header import DTYPE_BYTES, Stored, read_header
from turboquant.runtime.device import host_copies

DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
}
assert DTYPES.keys() == DTYPE_BYTES.keys()


class FileError(Exception):
    """A file cannot be used; the message is the reason."""


# ---- checksums

# XXH3 finds accidental damage. It does not stop an attacker, who could compute any checksum. On one core, XXH3 is as
# fast as memory, while SHA-256 is only as fast as a disk.


def digest_file(file: BinaryIO) -> str:
    """Return the checksum of all bytes of a file."""
    digest = xxhash.xxh3_128()
    file.seek(0)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def digest_tensors(tensors: Mapping[str, mx.array]) -> str:
    """Return a checksum over the names, dtypes, shapes and bytes of all tensors."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(json.dumps([name, names[x.dtype], x.shape]).encode())
        if x.size:
            digest.update(np.asarray(x.reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()


def digest_stored(file: BinaryIO, header: Mapping[str, Stored]) -> str:
    """Return the same checksum as ``digest_tensors``, computed from the bytes of a file that holds the tensors."""
    digest = xxhash.xxh3_128()
    for name in sorted(header):
        stored = header[name]
        digest.update(json.dumps([name, stored.dtype, stored.shape]).encode())
        file.seek(stored.start)
        left = stored.stop - stored.start
        while chunk := file.read(min(left, 1 << 20)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


# ---- writing and reading


def save_tensors(file: BinaryIO, tensors: Mapping[str, mx.array]) -> tuple[str, int]:
    """Write a safetensors file and return its checksum and its size in bytes. Raises OSError."""
    writer = _DigestingWriter(file)
    mx.save_safetensors(writer, host_copies(tensors))  # type: ignore[arg-type]
    return writer.digest.hexdigest(), file.tell()


class _DigestingWriter:
    """A file object that MLX can write to, and that computes the checksum of what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, xxhash.xxh3_128()
        self.closed = False  # MLX reads this attribute

    def write(self, data: memoryview) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def load_tensors(file: BinaryIO) -> tuple[dict[str, mx.array], str]:
    """Load all tensors of a safetensors file, and return them with the checksum of the file's bytes.

    Reads the file once, and holds only one tensor in memory twice. Raises ValueError as ``read_header`` does.
    """
    header, _ = read_header(file)
    in_order = sorted(header.items(), key=lambda item: (item[1].start, item[1].stop))
    buffer = bytearray(max((stored.stop - stored.start for stored in header.values()), default=0))
    digest, tensors = xxhash.xxh3_128(), {}
    file.seek(0)
    digest.update(file.read(in_order[0][1].start if in_order else -1))
    for name, stored in in_order:
        view = memoryview(buffer)[: stored.stop - stored.start]
        if file.readinto(view) != len(view):  # type: ignore[attr-defined]
            raise ValueError("the file ends early")
        digest.update(view)
        tensors[name] = _to_array(view, stored)
    mx.eval(tensors)  # an array that is not evaluated yet could not be evaluated in another thread
    return tensors, digest.hexdigest()


def _to_array(data: memoryview, stored: Stored) -> mx.array:
    dtype = DTYPES[stored.dtype]
    if not data:
        return mx.zeros(stored.shape, dtype)
    if dtype == mx.bfloat16:  # NumPy has no bfloat16
        return mx.array(np.frombuffer(data, np.uint16).reshape(stored.shape)).view(dtype)  # mx.array copies
    return mx.array(np.frombuffer(data, np.dtype(str(dtype).removeprefix("mlx.core."))).reshape(stored.shape))
