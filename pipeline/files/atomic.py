"""Files that are written whole or not at all, and survive a power cut once written.

Knows paths and what a disk may refuse; nothing of what is in a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import OutputError, is_disk_full, one_line
from turboquant.io.plain_files import flush

TEMPORARY = ".tmp-"  # readers of datasets pass over names that start with a dot


@contextmanager
def atomic_file(path: Path, ending: str = "") -> Iterator[Path]:
    """A temporary path beside `path`; once the block ends well it takes the place of `path`, all or nothing.

    `ending` is for files whose readers go by how names end. Raises OutputError where the disk refuses.
    """
    temporary = path.with_name(TEMPORARY + path.name + ending)
    with disk_errors(path, "cannot be written"):
        make_folder(path.parent)
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
        except Exception:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        flush(path.parent)


@contextmanager
def disk_errors(path: Path, problem: str) -> Iterator[None]:
    """What the disk refuses while the block runs is raised as OutputError, which says ``problem`` of ``path``."""
    try:
        yield
    except OSError as error:
        why = one_line(error)
        if is_disk_full(error):
            why = "the disk is full; free some space: what is done is kept, and the same command resumes"
        raise OutputError(f"{path}: {problem}: {why}") from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each of which survives a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush(folder.parent)
