"""Formats that are not read: how they are recognised, and the commands that convert them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import PurePath

BEGINNING = 8  # bytes of a file that tell what it is


@dataclass(frozen=True)
class _Conversion:
    """A format that is not read. command: makes {stem}.suffix or {unpacked} of {source}. magic: as that of `Format`."""

    name: str
    command: str
    magic: bytes = b""


_TO_CSV = "soffice --headless --convert-to csv {source}"
_PANDOC = "pandoc -t plain {source} -o {stem}.txt"
_CONVERSIONS = {
    ".gz": _Conversion("compressed by gzip", "gunzip -c < {source} > {unpacked}", b"\x1f\x8b"),
    ".bz2": _Conversion("compressed by bzip2", "bunzip2 -c < {source} > {unpacked}", b"BZh"),
    ".xz": _Conversion("compressed by xz", "unxz -c < {source} > {unpacked}", b"\xfd7zXZ\0"),
    ".zst": _Conversion("compressed by Zstandard", "unzstd -c < {source} > {unpacked}", b"\x28\xb5\x2f\xfd"),
    ".zip": _Conversion("a ZIP archive", "unzip {source} -d {stem}", b"PK\x03\x04"),
    ".pdf": _Conversion("PDF", "pdftotext {source} {stem}.txt", b"%PDF-"),
    "parquet": _Conversion("Parquet", "mv {source} {stem}.parquet", b"PAR1"),
    ".html": _Conversion("HTML", _PANDOC),
    ".htm": _Conversion("HTML", _PANDOC),
    ".rtf": _Conversion("RTF", _PANDOC, b"{\\rtf"),
    ".doc": _Conversion("a Word document of before 2007", "soffice --headless --convert-to docx {source}"),
    ".docx": _Conversion("a Word document", _PANDOC),
    ".xlsx": _Conversion("a spreadsheet", _TO_CSV),
    ".ods": _Conversion("a spreadsheet", _TO_CSV),
    ".odt": _Conversion("an OpenDocument text", _PANDOC),
    ".epub": _Conversion("EPUB", _PANDOC),
}
_ZIPPED = (".docx", ".odt", ".epub", ".xlsx", ".ods")  # a ZIP archive with such a suffix is what the suffix says


def what_else(path: str, beginning: bytes) -> str | None:
    """Return what a file is that cannot be read, and how to convert it, or None if that is not known.

    The result begins with "is". beginning: the first BEGINNING bytes of the file, which count more than its suffix.
    """
    suffix = PurePath(path).suffix.lower()
    by_content = next(
        (key for key, each in _CONVERSIONS.items() if each.magic and beginning.startswith(each.magic)), ""
    )
    found = _CONVERSIONS.get(suffix if by_content == ".zip" and suffix in _ZIPPED else by_content or suffix)
    if found is None:
        return None
    return f"is {found.name}; {how_to_convert(path, found.command, suffix == by_content)}"


def how_to_convert(path: str, command: str, is_unpacked: bool = False) -> str:
    """Return in words that a file must be converted, and how.

    command: with {source}, {stem} or {unpacked}, which becomes the path without its suffix if `is_unpacked`.
    """
    is_url = "://" in path
    source = PurePath(re.split("[?#]", path)[0].rpartition("/")[2] if is_url else path)  # keys may follow the name
    stem = source.with_suffix("")
    unpacked = stem if is_unpacked else stem.with_suffix(f".unpacked{source.suffix.lower()}")
    names = {"source": source, "stem": stem, "unpacked": unpacked}
    filled = command.format_map({name: shlex.quote(str(each)) for name, each in names.items()})
    return f"{'download it and ' if is_url else ''}convert it, for example by: {filled}"
