"""Files on other machines, by URL, through fsspec: found, read by ranges, and put there whole.

Knows what filesystems raise, and what of that is worth another try; not what is in a file. Each filesystem looks for
its credentials and settings where it always does: in the environment and its own configuration.
"""

from __future__ import annotations

import glob
import io
from collections.abc import Callable
from pathlib import Path
from posixpath import dirname
from typing import Any, TypeVar

import fsspec

from pipeline.errors import JobError, PipelineError, RemoteError, one_line
from pipeline.retry import retried

RETRIES = 3
_BLOCK_BYTES, _BLOCKS = 4 << 20, 8  # what is held of a file that is read
_PART_BYTES = 8 << 20  # of a file that is written
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # of this project
_Result = TypeVar("_Result")


def is_url(path: str) -> bool:
    """Whether a path is one of another machine."""
    return "://" in path


def find(url: str) -> tuple[str, bool, list[str]]:
    """The folder that a URL's files are in, whether that is what it names, and the URLs of the files, by name.

    Those of a folder are its own, not its subfolders'; those of a glob are what matches, hidden ones left out. There
    are none where there is nothing. Raises JobError and RemoteError.
    """
    filesystem, path = _filesystem(url)
    kind = _patiently(url, lambda: _kind(filesystem, path))
    is_folder, base, found = kind == "directory", path, []
    if is_folder:
        found = _patiently(url, lambda: filesystem.ls(path, detail=True))
    elif kind is not None:
        base, found = dirname(path), [{"name": path, "type": kind}]
    elif glob.has_magic(path):
        found = list(_patiently(url, lambda: filesystem.glob(path, detail=True)).values())
        while glob.has_magic(base):
            base = dirname(base)
    names = sorted(entry["name"] for entry in found if entry["type"] == "file")
    shown = [name for name in names if not _is_hidden(name.removeprefix(base))]
    full_name = filesystem.unstrip_protocol
    return full_name(base), is_folder, [full_name(name) for name in shown]


def open_remote(url: str) -> io.RawIOBase:
    """A file, to be read in any order. Raises FileNotFoundError, JobError and RemoteError, also while it is read."""
    filesystem, path = _filesystem(url)
    cache = {"cache_type": "blockcache", "cache_options": {"maxblocks": _BLOCKS}}
    return _RemoteFile(url, _patiently(url, lambda: filesystem.open(path, "rb", block_size=_BLOCK_BYTES, **cache)))


def upload(file: Path, url: str, retries: int = RETRIES) -> None:
    """Copy a file to a URL, where it appears whole or not at all. Raises JobError and RemoteError."""
    filesystem, path = _filesystem(url)
    try:
        _patiently(url, lambda: filesystem.put_file(str(file), path, chunksize=_PART_BYTES), retries)
    except FileNotFoundError:
        raise JobError(f"{url}: cannot be written: there is no such bucket; make it, or set another path") from None


class _RemoteFile(io.RawIOBase):
    """A file of fsspec's that is read again where reading fails.

    It holds a few blocks, so that columns that are read in turn don't push each other out.
    """

    def __init__(self, url: str, file: Any) -> None:
        super().__init__()
        self._url, self._file = url, file

    def readinto(self, buffer: Any) -> int:
        content = _patiently(self._url, lambda: self._file.read(len(buffer)))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _filesystem(url: str) -> tuple[Any, str]:
    """The filesystem that a URL is of, and the path in it."""
    scheme = url.partition("://")[0]
    try:
        found: tuple[Any, str] = _patiently(url, lambda: fsspec.url_to_fs(url))
    except ImportError as error:
        extra = f"this project with its extra `{_EXTRAS[scheme]}`" if scheme in _EXTRAS else one_line(error)
        raise JobError(f"{url}: {scheme}:// needs a package that is not installed: install {extra}") from None
    return found


def _kind(filesystem: Any, path: str) -> str | None:
    """``file``, ``directory``, or None where there is nothing."""
    try:
        return str(filesystem.info(path)["type"])
    except FileNotFoundError:
        return None


def _is_hidden(name: str) -> bool:
    return name.endswith("/") or any(part.startswith(".") for part in name.split("/"))


def _patiently(url: str, call: Callable[[], _Result], retries: int = RETRIES) -> _Result:
    """What a call gives, made again where that may help. Raises FileNotFoundError, ImportError, JobError, RemoteError.

    Nothing is known of the exceptions of filesystems that may not be installed but what they are called.
    """

    def attempt() -> _Result:
        try:
            return call()
        except (FileNotFoundError, ImportError, PipelineError):
            raise
        except Exception as error:
            if _is_refusal(error):
                told = f"{url}: access is refused: {one_line(error)}"
                raise JobError(f"{told}; set credentials, as for the other tools of where it is") from error
            if isinstance(error, ValueError | TypeError | NotImplementedError):
                raise JobError(f"{url}: cannot be used: {one_line(error)}") from error
            raise RemoteError(
                f"{url}: cannot be reached: {one_line(error)}; when the network is back, the same command goes on"
            ) from error

    return retried(attempt, retries, lambda: None)


def _is_refusal(error: Exception) -> bool:
    name = type(error).__name__
    response = getattr(error, "response", None)
    codes = {getattr(error, "code", None), getattr(response, "status_code", None)}
    said = isinstance(error, PermissionError) or str(error).startswith("Forbidden")
    return said or "Credentials" in name or "Token" in name or not codes.isdisjoint((401, 403))
