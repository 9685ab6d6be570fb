"""Files in the user's cache folder that keep compiled kernels and the results of trials of kernels.

A file holds its name, its key and a checksum of its content. It is written whole or not at all, so several processes
may share the folder. A file that is damaged, of another version or of another key counts as absent and is replaced.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from turboquant.runtime.cache_folders import user_cache_folder

FORMAT = 1
UNUSED_DAYS = 180  # after which a file is removed
SUFFIX = ".compiled"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompiledFiles:
    """A folder of compiled files; it need not exist yet."""

    folder: Path

    def read(self, name: str, key: str) -> tuple[bytes, dict[str, Any]] | None:
        """Return the content and the header of the file of a name and a key, or None if there is no valid file."""
        path = self._path(name, key)
        try:
            with path.open("rb") as file:
                header = json.loads(file.readline(1 << 16))
                content = file.read()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.info("a compiled kernel cannot be read and is made anew: %s: %s", path, error)
            return None
        expected = {"format": FORMAT, "name": name, "key": key, "checksum": xxhash.xxh3_128_hexdigest(content)}
        if not isinstance(header, dict) or {field: header.get(field) for field in expected} != expected:
            _log.info("a compiled kernel is damaged or another's and is made anew: %s", path)
            return None
        with contextlib.suppress(OSError):  # another process may have removed it
            if time.time() - path.stat().st_mtime > 86400:
                os.utime(path)  # it is in use
        return content, header

    def write(self, name: str, key: str, content: bytes, about: Mapping[str, Any]) -> None:
        """Write a file, in place of an older one of the same name and key. A failure is logged and raises nothing."""
        header = {
            **about,
            "format": FORMAT,
            "name": name,
            "key": key,
            "checksum": xxhash.xxh3_128_hexdigest(content),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        path = self._path(name, key)
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(json.dumps(header).encode() + b"\n" + content)
            os.replace(temporary, path)
        except OSError as error:
            _log.info("a compiled kernel cannot be kept: %s: %s", path, error)
            with contextlib.suppress(OSError):
                temporary.unlink()

    def keys(self, name: str) -> list[str]:
        """Return the keys of all files of a name, valid or not."""
        prefix = f"{name}-"
        return sorted(path.name[len(prefix) : -len(SUFFIX)] for path in self.folder.glob(f"{prefix}*{SUFFIX}"))

    def remove_unused(self) -> None:
        """Remove files that were not read for ``UNUSED_DAYS``, and temporary files that are older than a day."""
        now = time.time()
        for pattern, days in ((f"*{SUFFIX}", UNUSED_DAYS), (".*", 1)):
            for path in self.folder.glob(pattern):
                with contextlib.suppress(OSError):
                    if now - path.stat().st_mtime > days * 86400:
                        path.unlink()

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key}{SUFFIX}"


def key_of(*parts: object) -> str:
    """Return a key for these parts: a digest of their ``repr``."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def compiled_files() -> CompiledFiles:
    """Return the user's compiled files, in ``turboquant/kernels`` in the user's cache folder."""
    return CompiledFiles(user_cache_folder() / "turboquant" / "kernels")
