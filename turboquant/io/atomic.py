"""Files that are replaced as a whole, and folders whose files are opened without following links.

After a crash or a power cut, a file written here holds its old content or its new content, never a part of it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp-"  # how the names of temporary files begin: readers of datasets ignore names that start with a dot
_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC


class IrregularFile(OSError):
    """There is something else than the expected file or folder, such as a link, a pipe or a device."""


class Folder:
    """An open folder. Everything in it is reached by its name and relative to the folder, and no link is followed.

    All methods raise OSError. path: for messages.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading. Raises IrregularFile for a link, a pipe or a device, which might never end."""
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _NO_LINK, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
                raise IrregularFile("it is not a regular file") from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise IrregularFile("it is not a regular file")
        return open(descriptor, "rb")

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[BinaryIO]:
        """Yield a new file to write; when the block ends without an error, it replaces the file of that name.

        The file's bytes are flushed before that, and the folder's entries after it. Where the block raises, what was
        there stays as it was.
        """
        with _replacing(self, name, "") as (file, _):
            yield file

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with everything in it. A link is removed, and not what it points to."""
        try:
            os.unlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):  # Linux and macOS report a folder differently
            if not stat.S_ISDIR(os.lstat(name, dir_fd=self.descriptor).st_mode):
                raise
            with self.folder(name) as folder:
                for inner in os.listdir(folder.descriptor):
                    folder.remove(inner)
            os.rmdir(name, dir_fd=self.descriptor)

    @contextlib.contextmanager
    def folder(self, name: str, make: bool = False) -> Iterator[Folder]:
        """Open a folder in this one. Raises IrregularFile for anything else. make: make it if it is missing."""
        path = self.path / name
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=self.descriptor)
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _NO_LINK, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise IrregularFile(f"{path} is a link or a file, where a folder belongs; remove it") from None
            raise
        try:
            yield Folder(path, descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def open_folder(path: Path, root: Path | None = None, make: bool = False) -> Iterator[Folder]:
    """Open a folder.

    root: a folder above it, below which no part of the path may be a link. make: make the folders that are missing.

    Raises IrregularFile if there is a link or a file in the place of a folder, and OSError.
    """
    root = path if root is None else root
    if make:
        root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            folder = Folder(root, os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except NotADirectoryError:
            raise IrregularFile(f"{root} is not a folder") from None
        stack.callback(os.close, folder.descriptor)
        for name in path.relative_to(root).parts:
            folder = stack.enter_context(folder.folder(name, make))
        yield folder


_NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)  # there is something else, or nothing


@contextlib.contextmanager
def replacing(path: Path, ending: str = "") -> Iterator[Path]:
    """Yield the path of a temporary file to write; when the block ends without an error, rename it to ``path``.

    This is ``Folder.replacing`` for writers that need a path. ending: what the temporary file's name must end with, for
    a writer or a reader that looks at it. Raises OSError where the file system refuses.
    """
    with open_folder(path.parent) as folder, _replacing(folder, path.name, ending) as (_, temporary):
        yield path.with_name(temporary)


@contextlib.contextmanager
def _replacing(folder: Folder, name: str, ending: str) -> Iterator[tuple[BinaryIO, str]]:
    temporary, at = f"{TEMPORARY}{name}.{secrets.token_hex(4)}{ending}", folder.descriptor
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK
    try:
        with open(os.open(temporary, flags, 0o666, dir_fd=at), "w+b") as file:
            yield file, temporary
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name, src_dir_fd=at, dst_dir_fd=at)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=at)
        raise
    os.fsync(at)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files for ``path`` whose writers were killed. Call it only if no process writes ``path``."""
    for leftover in path.parent.glob(f"{TEMPORARY}{glob.escape(path.name)}.{8 * '[0-9a-f]'}*"):
        leftover.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, as ``Folder.open`` does."""
    with open_folder(path.parent) as folder:
        return folder.open(path.name)


def open_followed(path: Path) -> BinaryIO:
    """Open a file for reading, also through a link. Raises IrregularFile for a pipe or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IrregularFile("it is not a regular file")
    return open(descriptor, "rb")


def may_pass(error: BaseException) -> bool:
    """Return whether a file could not be read for a reason that says nothing about its content.

    Such as a disk or a server that fails, a missing right, too many open files, or want of memory. An error about the
    content has no number, whoever raises it: this package, Python or pyarrow.

    >>> may_pass(OSError(errno.EIO, "Input/output error")), may_pass(OSError("Corrupt snappy compressed data."))
    (True, False)
    """
    if isinstance(error, OSError):
        return error.errno is not None and error.errno not in _NO_FILE
    return isinstance(error, MemoryError)
