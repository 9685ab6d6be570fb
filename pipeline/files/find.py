"""Find the files that a path, a folder, a glob or a URL names, and open them. Names tell the formats of files."""

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
    """An input file.

    path: its path or URL. id: its path relative to the folder that was searched.
    """

    path: str
    id: str

    def __str__(self) -> str:
        return self.path

    @property
    def format(self) -> str:
        """The format that the name stands for: PARQUET, JSON or TEXT_FILE."""
        return _FORMATS.get(_suffix(self.path), PARQUET)

    def open(self) -> BinaryIO | io.BufferedReader:
        """Open the file to be read from its beginning. Raises OSError, JobError and RemoteError."""
        return io.BufferedReader(remote.open_remote(self.path)) if remote.is_url(self.path) else open(self.path, "rb")

    def open_for_arrow(self) -> Any:
        """Open the file to be read by pyarrow, in any order."""
        return remote.open_remote(self.path) if remote.is_url(self.path) else pa.OSFile(self.path)


def find_files(path: str, key: str) -> list[InputFile]:
    """Return the files in the order in which they are read.

    key: the key of the job file that gives the path, for messages. Raises InputError if there are no files, or files of
    several formats.
    """
    base, is_folder, names = remote.find(path) if remote.is_url(path) else _find_here(path)
    if is_folder:
        names = [name for name in names if _suffix(name) in _FORMATS]
    relative_names = (os.fsencode(PurePath(name).relative_to(base).as_posix()) for name in names)
    files = [
        InputFile(name, key.decode("utf-8", errors="replace")) for name, key in zip(names, relative_names, strict=True)
    ]
    if not files:
        raise InputError(_nothing_found(path, key, is_folder))
    formats = Counter(file.format for file in files)
    if len(formats) > 1:
        counts = " and ".join(f"{count} {name} file{'s' * (count > 1)}" for name, count in sorted(formats.items()))
        example = os.path.join(path if is_folder else os.path.dirname(path), f"*{_suffix(names[0])}")
        raise InputError(f"{key}: {path} holds {counts}; name the files of one format, for example by {example}")
    return files


def _find_here(path: str) -> tuple[str, bool, list[str]]:
    """Do what `remote.find` does, for a path on this machine."""
    if os.path.isfile(path):
        return os.path.dirname(path), False, [path]
    is_folder = os.path.isdir(path)
    pattern = os.path.join(glob.escape(path), "*") if is_folder else path
    # Hidden files are left out, because they are other programs' temporary files.
    names = [name for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]
    base = path
    while not is_folder and glob.has_magic(base):
        base = os.path.dirname(base)
    return base, is_folder, names


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
