"""The files that a path, a folder, a glob or a URL names, and how each is opened.

Knows names, and formats by how names end; not what is in a file.
"""

from __future__ import annotations

import glob
import io
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.errors import InputError, suggestion
from pipeline.files import remote

PARQUET, JSON, TEXT_FILE = "Parquet", "JSON Lines", "text"
_FORMATS = {
    ".parquet": PARQUET,
    ".jsonl": JSON,
    ".ndjson": JSON,
    ".txt": TEXT_FILE,
    ".md": TEXT_FILE,
    ".markdown": TEXT_FILE,
}


@dataclass(frozen=True)
class InputFile:
    """``path`` may be a URL; ``id`` is what of it is relative to the folder that was named."""

    path: str
    id: str

    def __str__(self) -> str:
        return self.path

    @property
    def format(self) -> str:
        """What it is, to judge by its name."""
        return _FORMATS.get(_suffix(self.path), PARQUET)

    def open(self) -> BinaryIO | io.BufferedReader:
        """The file, to be read from its beginning. Raises OSError and what `remote` does."""
        return io.BufferedReader(remote.open_remote(self.path)) if remote.is_url(self.path) else open(self.path, "rb")

    def open_for_arrow(self) -> Any:
        """The file, to be read in any order."""
        return remote.open_remote(self.path) if remote.is_url(self.path) else pa.OSFile(self.path)


def find_files(path: str, key: str) -> list[InputFile]:
    """The files in the order in which they are read.

    key: of the job file, that the path was given by. Raises InputError where there is none, or of several formats.
    """
    base, is_folder, names = remote.find(path) if remote.is_url(path) else _find_here(path)
    if is_folder:
        names = [name for name in names if _suffix(name) in _FORMATS]
    files = [InputFile(name, _id(name, base)) for name in names]
    if not files:
        raise InputError(_nothing_found(path, key, is_folder))
    formats = Counter(file.format for file in files)
    if len(formats) > 1:
        counts = " and ".join(f"{count} {name} file{'s' * (count > 1)}" for name, count in sorted(formats.items()))
        example = os.path.join(path if is_folder else os.path.dirname(path), f"*{_suffix(names[0])}")
        raise InputError(f"{key}: {path} holds {counts}; name those of one format, as by {example}")
    return files


def _find_here(path: str) -> tuple[str, bool, list[str]]:
    """As `remote.find`, for a path of this machine."""
    if os.path.isfile(path):
        return os.path.dirname(path), False, [path]
    is_folder = os.path.isdir(path)
    pattern = os.path.join(glob.escape(path), "*") if is_folder else path
    # Without recursion and hidden files, which are other programs' temporary files; ordered by name.
    names = [name for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]
    base = path
    while not is_folder and glob.has_magic(base):
        base = os.path.dirname(base)
    return base, is_folder, names


def _id(name: str, base: str) -> str:
    return os.fsencode(PurePath(name).relative_to(base).as_posix()).decode("utf-8", errors="replace")


def _suffix(name: str) -> str:
    return PurePath(name).suffix.lower()


def _nothing_found(path: str, key: str, is_folder: bool) -> str:
    if is_folder:
        return f"{key}: the folder {path} holds no file named {', '.join(f'*{suffix}' for suffix in _FORMATS)}"
    if glob.has_magic(path):
        return f"{key}: no file matches {path}"
    if remote.is_url(path):
        return f"{key}: {path} does not exist: there is no such file or bucket, or none that these credentials may see"
    beside: list[str] = []
    with suppress(OSError):
        beside += [file.name for file in Path(path).parent.glob("*") if _suffix(file.name) in _FORMATS]
    return f"{key}: {path} does not exist{suggestion(os.path.basename(path), beside)}"
