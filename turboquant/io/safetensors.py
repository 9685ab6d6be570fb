"""Files of tensors: written so that a crash leaves nothing half, read as if by a stranger's hand.

Reading functions raise ValueError with a short reason.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
import xxhash

from turboquant.io.plain_files import flush

DTYPES = {  # safetensors' name of a dtype, MLX's, bytes
    "BOOL": (mx.bool_, 1),
    "U8": (mx.uint8, 1),
    "I8": (mx.int8, 1),
    "U16": (mx.uint16, 2),
    "I16": (mx.int16, 2),
    "F16": (mx.float16, 2),
    "BF16": (mx.bfloat16, 2),
    "U32": (mx.uint32, 4),
    "I32": (mx.int32, 4),
    "F32": (mx.float32, 4),
    "U64": (mx.uint64, 8),
    "I64": (mx.int64, 8),
}
_NUMPY = {name: np.dtype(str(dtype).removeprefix("mlx.core.")) for name, (dtype, _) in DTYPES.items() if name != "BF16"}
LARGEST_HEADER = 16 << 20


class FileError(Exception):
    """A file cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor is in a file: bytes ``start`` to ``stop``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


# --- writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which durably takes the place of ``path`` unless an exception is raised."""
    temporary = path.parent / f".{uuid.uuid4().hex}.safetensors"
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file durably: temporary file, fsync, rename, fsync of the folder."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# --- checksums


# Against accidents: whoever wants to forge a file can compute any checksum. XXH3 is as fast as memory, and SHA-256 as
# fast as a disk, on one core.


def seal(manifest: Mapping[str, Any]) -> str:
    """The checksum of a manifest, over everything in it but ``manifest_checksum``."""
    content = {name: value for name, value in manifest.items() if name != "manifest_checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def digest_file(file: BinaryIO) -> str:
    """The checksum of a whole file's bytes."""
    digest = xxhash.xxh3_128()
    file.seek(0)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def digest_tensors(tensors: Mapping[str, mx.array]) -> str:
    """A checksum over the names, dtypes, shapes and bytes of all tensors."""
    names = {dtype: name for name, (dtype, _) in DTYPES.items()}
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(json.dumps([name, names[x.dtype], x.shape]).encode())
        if x.size:
            digest.update(np.asarray(x.reshape(-1).view(mx.uint8)).data)
    return digest.hexdigest()


def digest_stored(file: BinaryIO, header: Mapping[str, Stored]) -> str:
    """What ``digest_tensors`` gave for the tensors, computed from the file's bytes."""
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


# --- reading


def read_header(file: BinaryIO) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Raises ValueError unless every tensor is of a known dtype and as long as its shape says, and the tensors fill
    the file without gaps: only such a file is given to MLX, which would believe any header.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is no mapping")
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null for none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the header's metadata is no mapping of text")
    tensors = {name: _stored(name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.stop)):
        if stored.start != end:
            raise ValueError("the tensors overlap, or there are gaps between them")
        end = stored.stop
    if end != size:
        raise ValueError(f"the tensors end at byte {end} of {size}")
    return tensors, metadata


def parse_json(text: bytes) -> Any:
    """Parse JSON from a stranger. Raises ValueError for a key twice in a mapping too, or for too deep a nesting."""

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            raise ValueError("a key is there twice")
        return parsed

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=mapping)
    except RecursionError:
        raise ValueError("too deep a nesting") from None


def save_tensors(path: Path, tensors: Mapping[str, mx.array]) -> tuple[str, int]:
    """Write a safetensors file; returns its checksum and size. Raises OSError as the disk does."""
    with path.open("wb") as file:
        writer = _Digesting(file)
        mx.save_safetensors(writer, dict(tensors))  # type: ignore[arg-type]
        return writer.digest.hexdigest(), file.tell()


class _Digesting:
    """A file for MLX to write to that takes the checksum of what it is given."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, xxhash.xxh3_128()
        self.closed = False  # MLX asks

    def write(self, data: memoryview) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def load_tensors(file: BinaryIO) -> tuple[dict[str, mx.array], str]:
    """All tensors of a safetensors file, in memory, and the checksum of its bytes.

    Reads the file once, and holds one tensor twice at a time. Raises ValueError as ``read_header`` does.
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
    mx.eval(tensors)  # what is not computed yet could not be in another thread
    return tensors, digest.hexdigest()


def _to_array(data: memoryview, stored: Stored) -> mx.array:
    dtype = DTYPES[stored.dtype][0]
    if not data:
        return mx.zeros(stored.shape, dtype)
    raw = np.frombuffer(data, np.uint16 if stored.dtype == "BF16" else _NUMPY[stored.dtype])
    x = mx.array(raw.reshape(stored.shape))  # copies
    return x.view(dtype) if stored.dtype == "BF16" else x


def _stored(name: str, entry: Any, data: int) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > 8 or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has no shape, or no place")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} is of the unknown dtype {dtype!r}")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype][1]:
        raise ValueError(f"tensor {name!r} is not as long as its shape says")
    return Stored(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
