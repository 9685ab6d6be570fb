"""The entries of a store's folder, and the order in which they are evicted.

An entry is read from its manifest; no tensor is loaded. Which contexts unfinished jobs need is decided in pins.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from turboquant.io.segment_file import MANIFEST, SegmentError, read_manifest

REJECTED = "rejected"
_KEY = re.compile(r"[0-9a-f]{64}")
_SET_ASIDE = re.compile(r"[0-9a-f]{64}-\d+")


@dataclass(frozen=True)
class Entry:
    """One segment's folder, or what is left of it.

    bytes: size on disk. used: time of the last write or load, in seconds since the epoch. manifest: the segment's
    manifest, or None if the segment cannot be used. problem: the reason why it cannot be used.
    """

    folder: Path
    bytes: int
    used: float
    manifest: Mapping[str, Any] | None
    problem: str | None = None

    @property
    def key(self) -> str:
        """The segment's key, which is the name of its folder."""
        return self.folder.name

    @property
    def parent(self) -> str | None:
        """The key of the segment before this one; None if it is the first of its context."""
        return self.manifest.get("parent") if self.manifest else None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The segment's origin, such as its model and its document, as `Store.save` was given it."""
        metadata = self.manifest.get("about") if self.manifest else None
        return metadata if isinstance(metadata, dict) else {}

    @property
    def label(self) -> str:
        """The label of the segment's context."""
        return str(self.metadata.get("label", ""))

    @property
    def created(self) -> float | None:
        """Time at which the segment was built, in seconds since the epoch."""
        try:
            return datetime.fromisoformat(str((self.manifest or {}).get("created"))).timestamp()
        except ValueError:
            return None

    @property
    def tokens(self) -> int:
        """Number of tokens in the segment."""
        return int(self.manifest["tokens"]) if self.manifest else 0


def list_entries(folder: Path) -> Iterator[Entry]:
    """Yield an entry for each whole, damaged, rejected or partly written segment in a store's folder.

    The names of files and folders decide which ones belong to the store. All other files are ignored.
    """
    for path in sorted(folder.glob(f"{REJECTED}/*")):
        if _SET_ASIDE.fullmatch(path.name) and not path.is_symlink():
            yield Entry(path, size_of(path), 0.0, None, "rejected")
    for path in sorted(folder.glob("??/*")):
        linked = path.is_symlink() or path.parent.is_symlink()  # the target is outside the store
        if _KEY.fullmatch(path.name) and path.name.startswith(path.parent.name) and not linked:
            yield from _segment_entry(path)


def _segment_entry(path: Path) -> Iterator[Entry]:
    """Yield the entry of a segment's folder, or nothing if another process has just removed it."""
    try:
        used = (path / MANIFEST).stat().st_mtime
        manifest = read_manifest(path)
    except FileNotFoundError:
        if path.is_dir():
            yield Entry(path, size_of(path), 0.0, None, "written in part")
    except SegmentError as error:
        yield Entry(path, size_of(path), 0.0, None, str(error))
    except OSError:
        return
    else:
        yield Entry(path, size_of(path), used, manifest)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder. Files that vanish meanwhile count as 0."""
    total = 0
    with suppress(OSError):
        if not path.is_dir():
            return path.stat().st_size
        with os.scandir(path) as items:
            for item in items:
                if item.is_dir(follow_symlinks=False):
                    total += size_of(Path(item.path))
                else:
                    with suppress(OSError):
                        total += item.stat(follow_symlinks=False).st_size
    return total


def remove_entry(entry: Entry) -> None:
    """Remove an entry's folder. Raises OSError.

    The manifest is removed first, so that a crash never leaves a folder that looks like a whole segment.
    """
    for name in (MANIFEST, *sorted(path.name for path in entry.folder.iterdir() if path.name != MANIFEST)):
        (entry.folder / name).unlink(missing_ok=True)
    entry.folder.rmdir()
    with suppress(OSError):
        entry.folder.parent.rmdir()  # works only if this was the last entry in that folder


def eviction_order(entries: Iterable[Entry], is_needed: Callable[[Entry], bool]) -> list[Entry]:
    """Return the entries that may be removed, in the order in which to remove them.

    Entries with a problem come first, then the least recently used. A segment comes after all segments that continue
    it, and it is kept while one of them is needed.
    """
    unusable: list[Entry] = []
    usable: dict[str, Entry] = {}
    for entry in entries:
        if entry.problem is None:
            usable[entry.key] = entry
        else:
            unusable.append(entry)
    kept: set[str] = set()
    used = {key: entry.used for key, entry in usable.items()}
    deepest_first = sorted(usable.values(), key=lambda entry: -int(entry.manifest["start"] if entry.manifest else 0))
    for entry in deepest_first:
        needed = entry.key in kept or is_needed(entry)
        if needed:
            kept.add(entry.key)
        if entry.parent in usable:
            used[entry.parent] = max(used[entry.parent], used[entry.key])
            if needed:
                kept.add(entry.parent)
    position = {entry.key: number for number, entry in enumerate(deepest_first)}
    removable = [entry for entry in usable.values() if entry.key not in kept]
    return unusable + sorted(removable, key=lambda entry: (used[entry.key], position[entry.key]))
