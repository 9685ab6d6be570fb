"""Find the files that a path, a folder, a glob or a URL names. Their suffixes tell their formats."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from pipeline.errors import InputError, one_line, suggestion
from pipeline.files import remote
from pipeline.files.compression import COMPRESSIONS, compression
from pipeline.files.conversions import what_else
from pipeline.files.formats import Format, InputFile, beginning, listed
from pipeline.files.paths import has_wildcards, literal


@dataclass(frozen=True)
class Found:
    """The files in the order in which they are read, and in words what lies beside them and is not read, or ""."""

    files: Sequence[InputFile]
    passed_over: str = ""


def find_files(path: str, key: str, formats: Sequence[Format], follow_links: bool = True) -> Found:
    """Find the files that are read.

    key: the key of the job file that gives the path, for messages. formats: those that may be read. follow_links:
    whether files are read that a folder or a glob reaches through symbolic links only. Raises InputError if there are
    no files, or files of several formats or of none.
    """
    base, is_folder, names = remote.find(path) if remote.is_url(path) else _find_here(path)
    if not follow_links and not remote.is_url(path):
        names = [name for name in names if name == path or not _is_behind_link(base, name)]
    by_suffix = {suffix: each for each in formats for suffix in each.suffixes}
    packed = [(suffix, each) for suffix, each in by_suffix.items() if each.may_be_compressed]
    by_suffix |= {f"{suffix}{ending}": each for suffix, each in packed for ending in COMPRESSIONS}
    others: list[str] = []
    if is_folder:
        others = [name for name in names if _suffix(name) not in by_suffix]
        names = [name for name in names if _suffix(name) in by_suffix]
    if not names:
        raise InputError(_nothing_found(path, key, is_folder, others, formats))
    files = [
        InputFile(name, _id(name, base), by_suffix.get(_suffix(name)) or _sniff(name, key, formats)) for name in names
    ]
    counts = Counter(file.format.name for file in files)
    if len(counts) > 1:
        told = " and ".join(f"{count} {name} file{'s' * (count > 1)}" for name, count in sorted(counts.items()))
        example = os.path.join(path if is_folder else os.path.dirname(path), f"*{_suffix(names[0])}")
        raise InputError(f"{key}: {path} holds {told}; name the files of one format, for example by {example}")
    return Found(files, _passed_over(path, others, _suffix(names[0])) if is_folder else "")


def _find_here(path: str) -> tuple[str, bool, list[str]]:
    """Do what `remote.find` does, for a path on this machine."""
    if os.path.isfile(path):
        return os.path.dirname(path), False, [path]
    is_folder = os.path.isdir(path)
    pattern = os.path.join(glob.escape(path), "*") if is_folder else path
    # Hidden files are left out, because they are other programs' temporary files.
    names = [name for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]
    base = path if is_folder else os.path.dirname(path)
    while not is_folder and has_wildcards(base):
        base = os.path.dirname(base)
    return base if is_folder else literal(base), is_folder, names


def _sniff(path: str, key: str, formats: Sequence[Format]) -> Format:
    """Return the format of a file whose suffix says none. Raises InputError."""
    try:
        first = beginning(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from None
    for each in formats:
        if each.magic and first.startswith(each.magic):
            return each
    what = what_else(path, first) or "has none of them, by its name and by its content"
    raise InputError(f"{key}: the formats of files are {listed(formats)}; {path} {what}")


def _id(name: str, base: str) -> str:
    return os.fsencode(PurePath(name).relative_to(base).as_posix()).decode("utf-8", errors="replace")


def _is_behind_link(base: str, name: str) -> bool:
    """Return whether a file is a link, or is in a folder below the base that is one."""
    below = PurePath(name).relative_to(base)
    return any(os.path.islink(os.path.join(base, part)) for part in (below, *below.parents[:-1]))


def _suffix(name: str) -> str:
    """Return the suffix of a name in lower case, with that of a compression behind it."""
    packed = compression(name)
    return f"{PurePath(name.removesuffix(packed)).suffix}{packed}".lower()


def _passed_over(folder: str, others: Sequence[str], suffix: str) -> str:
    """Return in words what lies in a folder and is not read, or "". suffix: of the files that are read."""
    subfolders = 0
    if not remote.is_url(folder):
        with os.scandir(folder) as entries:
            subfolders = sum(entry.is_dir() and not entry.name.startswith(".") for entry in entries)
    told = [f"{subfolders} subfolder{'s' * (subfolders > 1)}"] * bool(subfolders)
    if others:
        suffixes = ", ".join(sorted({f"*{_suffix(name)}" for name in others}))
        told.append(f"{len(others)} file{'s' * (len(others) > 1)} of other types ({suffixes})")
    if not told:
        return ""
    glob_of_all = f"; {os.path.join(folder, '**', f'*{suffix}')} names the files in subfolders too"
    return f"{folder}: passed over: {' and '.join(told)}{glob_of_all * bool(subfolders)}"


def _nothing_found(path: str, key: str, is_folder: bool, others: Sequence[str], formats: Sequence[Format]) -> str:
    if is_folder:
        message = f"{key}: the folder {path} holds no file of the formats that are read: {listed(formats)}"
        what = next(filter(None, (f"{name} {told}" for name in others if (told := what_else(name, b"")))), "")
        return f"{message}{what and '; '}{what}"
    if remote.is_url(path) and not glob.has_magic(path):
        return f"{key}: {path} does not exist: there is no such file or bucket, or none that these credentials may see"
    is_glob, path = has_wildcards(path), literal(path)
    if is_glob:
        return f"{key}: no file matches {path}"
    suffixes = {suffix for each in formats for suffix in each.suffixes}
    beside: list[str] = []
    with suppress(OSError):
        beside += [file.name for file in Path(path).parent.glob("*") if _suffix(file.name) in suffixes]
    return f"{key}: {path} does not exist{suggestion(os.path.basename(path), beside)}"
