"""Compressed files, told by the suffix of their names, and read as a stream."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import PurePath
from typing import Any

import pyarrow as pa

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BUFFER_BYTES = 1 << 16


def compression(path: str) -> str:
    """Return the suffix of a path or URL that says how its content is compressed, or ""."""
    suffix = PurePath(path).suffix
    return suffix if suffix.lower() in COMPRESSIONS else ""


def decompressed(content: io.BufferedReader, suffix: str) -> io.BufferedReader:
    """Return the content of a file that is compressed as a suffix says; reading raises OSError if it is damaged."""
    suffix = suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(_Unpacked(gzip.GzipFile(fileobj=content), content), _BUFFER_BYTES)
    if suffix == ".bz2":
        return io.BufferedReader(_Unpacked(bz2.BZ2File(content), content), _BUFFER_BYTES)
    if suffix == ".xz":
        return io.BufferedReader(_Unpacked(lzma.LZMAFile(content), content), _BUFFER_BYTES)
    if suffix == ".zst":
        return io.BufferedReader(_Unpacked(pa.CompressedInputStream(content, "zstd"), content), _BUFFER_BYTES)
    return content


class _Unpacked(io.RawIOBase):
    """A stream whose errors, of which each library has its own, are those of a disk. packed: is closed with it."""

    def __init__(self, stream: Any, packed: io.BufferedReader) -> None:
        super().__init__()
        self._stream, self._packed = stream, packed

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except (EOFError, ValueError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's own
            raise OSError(f"it is cut off or damaged, or not compressed as its suffix says: {error}") from None
        buffer[: len(content)] = content
        return len(content)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        self._packed.close()
        super().close()
