"""Files on other machines, by URL, through fsspec: found, read by ranges, and uploaded as a whole.

An operation that fails is tried again if that may help. Each filesystem finds its credentials and settings where it
always does: in the environment and in its own configuration.
"""

from __future__ import annotations

import glob
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from posixpath import dirname
from threading import Timer
from typing import Any, TypeVar

import fsspec

from pipeline.errors import JobError, PipelineError, RemoteError, one_line
from pipeline.retry import attempts

RETRIES = 3
SECONDS_UNTIL_TOLD = 20.0  # that a server has not answered
BUFFER_BYTES = 1 << 20  # of a remote file that is read line by line
_BLOCK_BYTES, _BLOCKS = 4 << 20, 8  # of a file that is read, in memory
_SERVER_FAILS = (429, *range(500, 600))  # statuses of HTTP that may pass
_PART_BYTES = 8 << 20  # of a file that is written
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # the extra of this project by the scheme of URLs
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


def is_url(path: str) -> bool:
    """Return whether a path is a URL."""
    return "://" in path


def find(url: str) -> tuple[str, bool, list[str]]:
    """Find the files that a URL names: one file, those directly in a folder, or those that match a glob.

    Returns the folder that the files are in, whether the URL names that folder, and the URLs of the files, sorted by
    name and without hidden files; there are none if nothing is found. Raises JobError and RemoteError.
    """
    filesystem, path = _filesystem(url)
    kind = _patiently(url, lambda: _kind(filesystem, path))
    is_folder, base, entries = kind == "directory", path, []
    if is_folder:
        entries = _patiently(url, lambda: filesystem.ls(path, detail=True))
    elif kind is not None:
        base, entries = dirname(path), [{"name": path, "type": kind}]
    elif glob.has_magic(path):
        entries = list(_patiently(url, lambda: filesystem.glob(path, detail=True)).values())
        while glob.has_magic(base):
            base = dirname(base)
    names = sorted(entry["name"] for entry in entries if entry["type"] == "file")
    visible = [
        name
        for name in names
        if not name.endswith("/") and not any(part.startswith(".") for part in name.removeprefix(base).split("/"))
    ]
    full_name = filesystem.unstrip_protocol
    return full_name(base), is_folder, [full_name(name) for name in visible]


def open_remote(url: str) -> io.RawIOBase:
    """Open a file to be read in any order. This, and reading, raises FileNotFoundError, JobError and RemoteError."""
    filesystem, path = _filesystem(url)
    cache = {"cache_type": "blockcache", "cache_options": {"maxblocks": _BLOCKS}}
    return _RemoteFile(url, _patiently(url, lambda: filesystem.open(path, "rb", block_size=_BLOCK_BYTES, **cache)))


def upload(file: Path, url: str, retries: int = RETRIES) -> None:
    """Copy a file to a URL, where it appears as a whole or not at all. Raises JobError and RemoteError."""
    filesystem, path = _filesystem(url)
    try:
        _patiently(url, lambda: filesystem.put_file(str(file), path, chunksize=_PART_BYTES), retries)
    except FileNotFoundError:
        raise JobError(f"{url}: cannot be written: there is no such bucket; make it, or set another path") from None


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose reads are tried again if they fail.

    It keeps a few blocks, so that columns that are read by turns do not displace each other.
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
    """Return the filesystem of a URL, and the path in it."""
    scheme = url.partition("://")[0]
    try:
        filesystem_and_path: tuple[Any, str] = _patiently(url, lambda: fsspec.url_to_fs(url))
    except ImportError as error:
        extra = f"this project with its extra `{_EXTRAS[scheme]}`" if scheme in _EXTRAS else one_line(error)
        raise JobError(f"{url}: {scheme}:// needs a package that is not installed: install {extra}") from None
    return filesystem_and_path


def _kind(filesystem: Any, path: str) -> str | None:
    """Return `file`, `directory`, or None if there is nothing."""
    try:
        return str(filesystem.info(path)["type"])
    except FileNotFoundError as error:
        if _reason(error) is not error:
            raise
        return None


def _patiently(url: str, call: Callable[[], _Result], retries: int = RETRIES) -> _Result:
    """Return the result of a call, which is made again if that may help.

    The filesystems may not be installed, so their exceptions are told apart by their names and attributes. Raises
    FileNotFoundError, ImportError, JobError and RemoteError.
    """

    for attempt in attempts(retries, lambda: None):
        with attempt:
            try:
                with _pause_told(url):
                    return call()
            except (ImportError, PipelineError):
                raise
            except Exception as caught:
                error = _reason(caught)
                if isinstance(error, FileNotFoundError):
                    raise
                if (status := _status(error)) in _SERVER_FAILS:
                    raise RemoteError(
                        f"{url}: the server fails with HTTP status {status}; when it works again, the same command "
                        "goes on"
                    ) from error
                if _is_refusal(error):
                    message = f"{url}: access is refused: {one_line(error)}"
                    raise JobError(f"{message}; set credentials, as for the other tools of where it is") from error
                if isinstance(error, ValueError | TypeError | NotImplementedError):
                    raise JobError(f"{url}: cannot be used: {one_line(error)}") from error
                raise RemoteError(
                    f"{url}: cannot be reached: {one_line(error)}; when the network is back, the same command goes on"
                ) from error
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def _pause_told(url: str) -> Iterator[None]:
    """Log a line if the block waits long for a server: otherwise nobody would know why a run stands still."""
    timer = Timer(SECONDS_UNTIL_TOLD, _log.warning, ["%s: no answer for %g s; waiting for it", url, SECONDS_UNTIL_TOLD])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _reason(error: Exception) -> Exception:
    """Return the reason why a file is not found: fsspec says so of every failure of a server of HTTP."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    is_unreachable = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return cause if is_unreachable or _status(cause) not in (None, 404, 410) else error


def _status(error: Exception) -> int | None:
    """Return the HTTP status with which a server answered, or None."""
    for owner, name in ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code")):
        if isinstance(status := getattr(owner, name, None), int):
            return status
    return None


def _is_refusal(error: Exception) -> bool:
    name = type(error).__name__
    is_stated = isinstance(error, PermissionError) or str(error).startswith("Forbidden")
    return is_stated or "Credentials" in name or "Token" in name or _status(error) in (401, 403)
