"""The budget of a store, as a job file states it: bytes, a size with a unit, or a share of the disk.

>>> budget_bytes("20GB", Path("/"))
20000000000
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kKMGT]i?)?B?|(%))\s*")


def checked_budget(value: int | str) -> int | str:
    """Return the budget unchanged. Raises ValueError if it cannot be read."""
    if isinstance(value, int):
        valid = value > 0
    else:
        match = _SIZE.fullmatch(value)
        valid = match is not None and 0 < float(match[1]) <= (100 if match[3] else float("inf"))
    if not valid:
        raise ValueError(f"expected a size such as 20GB, 500MiB or 10%, got {value!r}")
    return value


def budget_bytes(value: int | str, folder: Path) -> int:
    """Return a budget in bytes. A share is one of the disk that holds `folder`, or will hold it."""
    match = None if isinstance(value, int) else _SIZE.fullmatch(value)
    if match is None:
        return int(value)
    if match[3]:
        return int(float(match[1]) / 100 * shutil.disk_usage(existing(folder)).total)
    unit = (match[2] or "").replace("K", "k").replace("ki", "Ki")
    return int(float(match[1]) * _UNITS[unit])


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return path if path.exists() else existing(path.parent)
