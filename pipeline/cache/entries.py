"""What lies in a store's folder, and what may go first where room is needed.

Knows manifests, sizes, ages and who stands behind whom; not which contexts a job still needs, and no tensors.
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
    """A segment's folder, or what is left of one.

    used: when it was last written or loaded, in seconds since the epoch.
    manifest: None where ``problem`` says why it is of no use.
    """

    folder: Path
    bytes: int
    used: float
    manifest: Mapping[str, Any] | None
    problem: str | None = None

    @property
    def key(self) -> str:
        """The segment's key, by its folder."""
        return self.folder.name

    @property
    def parent(self) -> str | None:
        """The key of the segment before it."""
        return self.manifest.get("parent") if self.manifest else None

    @property
    def about(self) -> Mapping[str, Any]:
        """What it was made from."""
        about = self.manifest.get("about") if self.manifest else None
        return about if isinstance(about, dict) else {}

    @property
    def label(self) -> str:
        """The label of its context."""
        return str(self.about.get("label", ""))

    @property
    def created(self) -> float | None:
        """When it was built, in seconds since the epoch."""
        try:
            return datetime.fromisoformat(str((self.manifest or {}).get("created"))).timestamp()
        except ValueError:
            return None

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        return int(self.manifest["tokens"]) if self.manifest else 0


def entries(folder: Path) -> Iterator[Entry]:
    """Everything in a store's folder that is a segment, was one or was to become one, by its name; no other file."""
    for path in sorted(folder.glob(f"{REJECTED}/*")):
        if _SET_ASIDE.fullmatch(path.name) and not path.is_symlink():
            yield Entry(path, size_of(path), 0.0, None, "rejected")
    for path in sorted(folder.glob("??/*")):
        linked = path.is_symlink() or path.parent.is_symlink()  # what lies elsewhere is none of the store's
        if _KEY.fullmatch(path.name) and path.name.startswith(path.parent.name) and not linked:
            yield from _segment(path)


def _segment(path: Path) -> Iterator[Entry]:
    """The entry of a segment's folder, unless it went just now."""
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
    """The size of a file, or of every file in a folder; what goes meanwhile counts nothing."""
    total = 0
    with suppress(OSError):
        if not path.is_dir():
            return path.stat().st_size
        with os.scandir(path) as found:
            for item in found:
                if item.is_dir(follow_symlinks=False):
                    total += size_of(Path(item.path))
                else:
                    with suppress(OSError):
                        total += item.stat(follow_symlinks=False).st_size
    return total


def remove(entry: Entry) -> None:
    """Remove an entry; its manifest goes first, so that a crash leaves nothing that seems whole. Raises OSError."""
    for name in (MANIFEST, *sorted(path.name for path in entry.folder.iterdir() if path.name != MANIFEST)):
        (entry.folder / name).unlink(missing_ok=True)
    entry.folder.rmdir()
    with suppress(OSError):
        entry.folder.parent.rmdir()  # if it was the last one there


def eviction_order(found: Iterable[Entry], is_needed: Callable[[Entry], bool]) -> list[Entry]:
    """What may be removed, in this order: what is of no use, then what was used least recently.

    A segment goes after those behind it, and stays as long as one of them is needed.
    """
    useless: list[Entry] = []
    usable: dict[str, Entry] = {}
    for entry in found:
        if entry.problem is None:
            usable[entry.key] = entry
        else:
            useless.append(entry)
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
    free = [entry for entry in usable.values() if entry.key not in kept]
    return useless + sorted(free, key=lambda entry: (used[entry.key], position[entry.key]))
