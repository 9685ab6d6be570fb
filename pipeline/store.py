"""The store: the folder of segments on disk, addressed by content.

    <cache dir>/<first 2 hex>/<key>/segment.safetensors + segment.json
    <cache dir>/rejected/…          what could not be used, set aside

Nothing found there is trusted: a segment that does not verify is set aside, the reason is logged, and the caller
builds it again. Knows keys and folders; what is in a segment is turboquant's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError, one_line
from turboquant import CacheCodec
from turboquant.files import MANIFEST, SegmentError, read_manifest, read_segment, write_segment
from turboquant.identity import Identity
from turboquant.segments import Segment

REJECTED = "rejected"
_log = logging.getLogger(__name__)


class Store:
    """Segments of any models and codecs in one folder, which is made when it is first written to."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"cache.dir: {folder} is a file; name a folder")
        self._folder = folder
        self._labels: dict[str, list[dict[str, Any]]] | None = None

    def load(self, key: str, codec: CacheCodec, identity: Identity, label: str) -> Segment | None:
        """The prefix stored under ``key``, verified, or None; why not is logged."""
        folder = self._path(key)
        try:
            return read_segment(folder, key, codec)
        except SegmentError as error:
            if not (folder / MANIFEST).exists():
                _log.info("prefix %.12s not in the store: %s", key, self._explain(identity, label))
            else:
                _log.warning("prefix %.12s rejected and built again: %s", key, error)
                self._set_aside(folder, key)
        return None

    def save(self, key: str, segment: Segment, identity: Identity, label: str) -> int:
        """Store a prefix durably; returns its bytes on disk. Raises StoreError where the disk refuses."""
        folder = self._path(key)
        try:
            if folder.exists():
                for leftover in folder.glob(".*"):  # of a run that was killed while it wrote
                    leftover.unlink()
            return write_segment(folder, key, segment, identity, label=label)
        except (OSError, RuntimeError, TypeError) as error:
            # MLX raises RuntimeError where the disk is full, turboquant TypeError for layers it cannot store.
            raise StoreError(f"{folder}: a prefix cannot be stored: {one_line(error)}") from error

    def contains(self, key: str) -> bool:
        """Whether a complete segment seems to be there; it is verified only when loaded."""
        return (self._path(key) / MANIFEST).is_file()

    def contexts(self, identity: Identity) -> Iterator[tuple[str, int]]:
        """Label and tokens of every context stored under an identity, as its manifest says; none is loaded."""
        wanted = asdict(identity)
        for manifest in self._manifests():
            label, tokens = manifest.get("label"), manifest.get("tokens")
            if manifest["identity"] != wanted or not label:
                continue
            if isinstance(label, str) and type(tokens) is int and tokens > 0:
                yield label, tokens

    def used_bytes(self) -> int:
        """The size of every file in the folder."""
        return sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    def _set_aside(self, folder: Path, key: str) -> None:
        rejected = self._folder / REJECTED
        number = 0
        try:
            rejected.mkdir(exist_ok=True)
            while (target := rejected / f"{key}-{number}").exists():
                number += 1
            os.replace(folder, target)
        except OSError as error:  # it stays, and is rejected or replaced the next time
            _log.warning("%s: a bad segment cannot be set aside: %s", folder, one_line(error))

    def _explain(self, identity: Identity, label: str) -> str:
        """Why a key is absent: the first thing in which a segment of the same text differs."""
        if self._labels is None:
            self._labels = {}
            for manifest in self._manifests():
                self._labels.setdefault(str(manifest.get("label")), []).append(manifest["identity"])
        wanted = asdict(identity)
        for stored in self._labels.get(label, []):
            differing = [name for name, value in wanted.items() if stored.get(name) != value]
            if differing:
                name = differing[0]
                known = {"weights": "other weights", "tokenizer": "another tokenizer or chat template"}
                return known.get(name, f"{name} was '{stored.get(name)}', now '{wanted[name]}'")
        if label in self._labels:
            return "the context of this text ends elsewhere: the queries have changed"
        return "absent"

    def _manifests(self) -> Iterator[dict[str, Any]]:
        for path in self._folder.glob(f"??/*/{MANIFEST}"):
            try:
                yield read_manifest(path.parent)
            except SegmentError:
                continue
