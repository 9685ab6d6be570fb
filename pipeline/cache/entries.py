"""The entries of a store's folder: found by their names, read from their manifests, removed.

No tensor is loaded. index.py remembers entries, so that they are not read again each time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from turboquant.io.atomic import open_folder
from turboquant.io.identity import Identity
from turboquant.io.segment_file import MANIFEST, Manifest, SegmentError, read_manifest

REJECTED = "rejected"
WRITTEN_IN_PART = "written in part"
_BUCKET = re.compile(r"[0-9a-f]{2}")
_KEY = re.compile(r"[0-9a-f]{64}")
_SET_ASIDE = re.compile(r"[0-9a-f]{64}-\d{1,9}")


@dataclass(frozen=True)
class Entry:
    """One segment's folder, or what is left of it.

    key: the folder's name. bucket: name of the folder above it: the first two digits of the key, or ``rejected``.
    bytes: size on disk. used: time of the last write or load, in seconds since the epoch. problem: the reason why the
    segment cannot be used, or "". The rest is stated by the manifest of a segment without a problem: created is a time
    like used, or 0 if unknown; parent is "" for the first segment of a context; label is that of the context, which
    ends with this segment if whole; output is the digest of the job that built it.
    """

    key: str
    bucket: str
    bytes: int
    used: float
    problem: str = ""
    created: float = 0.0
    start: int = 0
    tokens: int = 0
    parent: str = ""
    label: str = ""
    whole: bool = False
    output: str = ""
    model: str = ""
    document: str = ""
    weights: str = ""
    tokenizer: str = ""
    codec: str = ""
    prefill: str = ""

    @property
    def identity(self) -> Identity:
        """The identity of the segment."""
        return Identity(self.weights, self.tokenizer, self.codec, self.prefill)

    def folder(self, store: Path) -> Path:
        """Return the segment's folder in a store."""
        return store / self.bucket / self.key


def list_buckets(store: Path) -> Iterator[tuple[str, int]]:
    """Yield the folders of a store that hold segments, each with its time of change in nanoseconds. Raises OSError.

    Links and all other files and folders are ignored.
    """
    with suppress(FileNotFoundError), os.scandir(store) as items:
        for item in items:
            if is_bucket(item.name) and item.is_dir(follow_symlinks=False):
                yield item.name, item.stat(follow_symlinks=False).st_mtime_ns


def is_bucket(name: str) -> bool:
    """Return whether a folder of this name in a store holds segments."""
    return name == REJECTED or _BUCKET.fullmatch(name) is not None


def list_keys(store: Path, bucket: str) -> Iterator[str]:
    """Yield the names of the segments' folders in a bucket. Raises OSError."""
    with suppress(FileNotFoundError), os.scandir(store / bucket) as items:
        for item in items:
            if is_key(item.name, bucket) and item.is_dir(follow_symlinks=False):
                yield item.name


def is_key(name: str, bucket: str) -> bool:
    """Return whether a segment's folder in a bucket may have this name."""
    if bucket == REJECTED:
        return _SET_ASIDE.fullmatch(name) is not None
    return _KEY.fullmatch(name) is not None and name.startswith(bucket)


def read_entry(store: Path, bucket: str, key: str) -> Entry | None:
    """Read the entry of a segment's folder. Return None if another process has just removed it. Raises OSError."""
    folder = store / bucket / key
    if bucket == REJECTED:
        return Entry(key, bucket, size_of(folder), 0.0, "rejected")
    try:
        used = os.stat(folder / MANIFEST, follow_symlinks=False).st_mtime
        manifest = read_manifest(folder, store)
    except FileNotFoundError:
        return Entry(key, bucket, size_of(folder), 0.0, WRITTEN_IN_PART) if folder.is_dir() else None
    except NotADirectoryError:
        return None
    except SegmentError as error:
        return Entry(key, bucket, size_of(folder), 0.0, str(error))
    about = manifest.about
    return Entry(
        key,
        bucket,
        size_of(folder),
        used,
        created=_seconds(manifest),
        start=manifest.start,
        tokens=manifest.tokens,
        parent=manifest.parent or "",
        **{name: str(about.get(name, "")) for name in ("label", "output", "model", "document")},
        whole=about.get("whole") is True,
        **asdict(manifest.identity),
    )


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


def remove_entry(store: Path, entry: Entry) -> None:
    """Remove an entry's folder. Raises OSError.

    The manifest is removed first, so that a crash never leaves a folder that looks like a whole segment.
    """
    with suppress(FileNotFoundError), open_folder(store / entry.bucket, store) as bucket:
        with bucket.folder(entry.key) as folder:
            folder.remove(MANIFEST)
        bucket.remove(entry.key)
    with suppress(OSError):
        (store / entry.bucket).rmdir()  # works only if this was the last entry in that folder


def _seconds(manifest: Manifest) -> float:
    try:
        return datetime.fromisoformat(manifest.created).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0
