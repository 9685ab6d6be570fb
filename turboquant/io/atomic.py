"""Files that are replaced as a whole, and that are opened only if they are regular files.

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


@contextlib.contextmanager
def replacing(path: Path, ending: str = "") -> Iterator[Path]:
    """Yield the path of a temporary file to write; when the block ends without an error, rename it to ``path``.

    The file's bytes are flushed before the rename and the folder's entries after it. Where the block raises, the
    temporary file is removed and ``path`` stays as it was.

    ending: what the temporary file's name must end with, for a writer or a reader that looks at it.

    Raises OSError where the file system refuses.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{secrets.token_hex(4)}{ending}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


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


class IrregularFile(OSError):
    """There is something else than a regular file, such as a folder, a link, a pipe or a device."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError; IrregularFile also for a pipe or a device, which might never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):  # a link; a file in place of a folder; a socket
            raise IrregularFile("it is not a regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IrregularFile("it is not a regular file")
    return open(descriptor, "rb")
