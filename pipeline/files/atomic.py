"""Write files as a whole or not at all; once written, they survive a power cut. Errors of the disk are explained."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.errors import OutputError, is_disk_full, one_line
from turboquant.io.atomic import flush, remove_leftovers, replacing

_DEVICES = ("/dev", "/dev/fd", "/proc/self/fd")  # folders of devices; /dev/shm is an ordinary one


@contextmanager
def atomic_file(path: Path, ending: str = "", clear: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without an error, it replaces `path` as a whole.

    Folders that are missing are made. Only one process may write `path` at a time.

    ending: how the temporary name must end, for readers that look at it.
    clear: first remove temporary files for `path` whose writers were killed. That reads the whole folder.

    Raises OutputError for errors of the disk.
    """
    with disk_errors(path, "cannot be written"):
        make_folder(path.parent)
        if clear:
            remove_leftovers(path)
        with replacing(path, ending) as temporary:
            yield temporary


@contextmanager
def output_file(path: Path, ending: str = "") -> Iterator[Path]:
    """Do what `atomic_file` does, for a file that the user names.

    A link stays a link, and the file that it points to is replaced. What is no file, such as `/dev/stdout` or a named
    pipe, gets the bytes at the end of the block.
    """
    if not _is_device(path):
        with atomic_file(Path(os.path.realpath(path)), ending) as temporary:
            yield temporary
        return
    with disk_errors(path, "cannot be written"), TemporaryDirectory() as folder:
        temporary = Path(folder) / f"output{ending}"
        yield temporary
        with temporary.open("rb") as content, path.open("ab") as device:
            shutil.copyfileobj(content, device)


def _is_device(path: Path) -> bool:
    """Return whether a path is something that cannot be replaced by a file; the output of a shell may be a file."""
    try:
        mode = path.stat().st_mode
    except OSError:  # there is nothing yet, or the disk will say why it cannot be written
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or str(path.absolute().parent) in _DEVICES


@contextmanager
def disk_errors(path: Path, problem: str) -> Iterator[None]:
    """Raise OutputError for an OSError in the block. Its message says that `path` has the `problem`, and the reason."""
    try:
        yield
    except OSError as error:
        why = one_line(error)
        if is_disk_full(error):
            why = "the disk is full; free some space: what is done is kept, and the same command resumes"
        raise OutputError(f"{path}: {problem}: {why}") from error


def make_folder(folder: Path) -> None:
    """Make a folder and the folders above it, so that each of them survives a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush(folder.parent)
