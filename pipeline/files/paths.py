"""Paths and globs as a user writes them, relative to a folder."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

_ESCAPED = re.compile(r"\[([*?[])\]")  # a character that `glob.escape` has escaped


def absolute(path: str, folder: str | Path) -> str:
    """Return the absolute path, or glob, of one that is relative to a folder.

    Only what the user wrote can be a glob: in the name of the folder, brackets, * and ? are these characters. They are
    escaped, unless the path exists as it is.
    """
    whole = os.path.abspath(os.path.join(folder, os.path.expanduser(path)))
    if os.path.exists(whole):
        return whole
    head, _, tail = path.partition("/")
    if head.startswith("~"):
        folder, path = os.path.expanduser(head), tail
    return os.path.abspath(os.path.join(glob.escape(os.path.abspath(folder)), path))


def literal(path: str) -> str:
    """Return a path, or the part of a glob before its wildcards, without the escapes of `absolute`."""
    return _ESCAPED.sub(r"\1", path)


def has_wildcards(path: str) -> bool:
    """Return whether a path is a glob that can match several files."""
    return glob.has_magic(_ESCAPED.sub("", path))
