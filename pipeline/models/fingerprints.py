"""Fingerprints of models, adapters and tokenizers: digests of all files that decide what a model computes.

Two folders with the same content have the same fingerprint. This module imports neither MLX nor mlx-lm.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import StringConstraints, TypeAdapter

from pipeline.models.loading import WEIGHTS, adapter_files, weight_files
from turboquant.io.atomic import open_folder, open_regular, remove_leftovers
from turboquant.io.json_file import read_json, sealed

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "additional_chat_templates/*.jinja",
)
_CONFIGS = ("config.json", "generation_config.json", "hf_quant_config.json")  # generation_config.json has stop tokens
_CHECKSUM = "checksum"
# A file system notes times in steps of up to ten milliseconds, so two changes within a step may leave the same state.
_TIME_STEP = 0.02

FileState = tuple[int, int, int, int]  # size, inode, mtime and ctime in nanoseconds


@dataclass(frozen=True)
class _HashedFile:
    """The digest of a file, and the file's state when it was hashed. The times are in nanoseconds."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class _Memo:
    """The content of the memo. files: by resolved path."""

    format: Literal[2]
    files: dict[str, _HashedFile]


_MEMO = TypeAdapter(_Memo)


def weights_fingerprint(
    path: Path, memo: Path, remember: bool = True, adapter: Path | None = None, trust_remote_code: bool = False
) -> str:
    """Return the SHA-256 of the configs and of the content of every weight file.

    path: the model's folder. adapter: a folder whose files count too. trust_remote_code: whether the code that comes
    with the model is run, and therefore counts too.

    Hashing many gigabytes takes a while, so the JSON file `memo` remembers each file's digest under its resolved path,
    which is valid as long as size, times and inode of the file stay the same. A memo whose checksum is wrong is thrown
    away. remember: whether the memo is also written.
    """
    small = [file for name in _CONFIGS if (file := path / name).exists()]
    large = weight_files(path)
    if trust_remote_code:
        small += sorted(path.rglob("*.py"))
    if adapter is not None:
        config, weights = adapter_files(adapter)
        small, large = [*small, config], [*large, weights]
    remembered = _read_memo(memo)
    digests = {file: _content_digest(file, remembered) for file in large}
    if remember and any(remembered.get(key) != value for key, value in digests.values()):
        _write_memo(memo, {**remembered, **dict(digests.values())})
    parts = [(_name_in(path, file), file.read_bytes()) for file in small]
    parts += [(file.name, bytes.fromhex(value.sha256)) for file, (_, value) in digests.items()]
    return _digest("weights", parts)


def tokenizer_fingerprint(path: Path) -> str:
    """Return the SHA-256 of the files that decide how text becomes tokens: the vocabulary and the chat template."""
    files = sorted({file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)})
    parts = [(_name_in(path, file), file.read_bytes()) for file in files]
    # The last part is what a release hashed that also took arguments of the template; stores carry its fingerprint.
    return _digest("tokenizer", [*parts, ("template arguments", b"{}")])


def files_state(path: Path, adapter: Path | None = None, trust_remote_code: bool = False) -> dict[Path, FileState]:
    """Return size, inode and times of every file that counts in the fingerprints, and of the folders that hold them.

    If two looks return the same, all that was read between them had the same content: a file that was replaced and put
    back has another ctime, and a file that was added and removed changed its folder. The arguments are those of
    `weights_fingerprint`.
    """
    patterns = [*_CONFIGS, WEIGHTS, *_TOKENIZER_FILES, *(["**/*.py"] if trust_remote_code else [])]
    places = {path, *(file for pattern in patterns for file in path.glob(pattern))}
    if adapter is not None:
        places |= {adapter, *adapter.glob("*")}
    places |= {place.parent for place in places - {path, adapter}}
    states: dict[Path, FileState] = {}
    for place in places:
        with suppress(FileNotFoundError):
            states[place] = _file_state(place)
    return states


def _file_state(file: Path) -> FileState:
    """Return what tells whether a file has changed.

    Programs that copy or touch a file can set its mtime back, but not its ctime.
    """
    state = file.stat()
    if 0 <= time.time_ns() - state.st_ctime_ns < _TIME_STEP * 1e9:  # the next change could have the same time
        time.sleep(_TIME_STEP)
        state = file.stat()
    return state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns


def _name_in(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name


def _digest(kind: str, parts: Iterable[tuple[str, bytes]]) -> str:
    """Return the SHA-256 of named parts. The length of each field precedes it, so that no two lists look the same."""
    digest = hashlib.sha256()
    for name, content in [("kind", kind.encode()), *parts]:
        for field in (name.encode(), content):
            digest.update(len(field).to_bytes(8, "little") + field)
    return digest.hexdigest()


def _content_digest(file: Path, remembered: Mapping[str, _HashedFile]) -> tuple[str, _HashedFile]:
    """Return a file's resolved path, and its entry in the memo: its state and the SHA-256 of its content."""
    real = str(file.resolve())
    state = _file_state(Path(real))  # before hashing: if the file changes meanwhile, the entry is stale, but not wrong
    known = remembered.get(real)
    if known is not None and known == _HashedFile(*state, known.sha256):
        return real, known
    return real, _HashedFile(*state, _hash_once(real, state))


@lru_cache
def _hash_once(file: str, state: FileState) -> str:
    """Hash a file of this state, once for all identities that this process computes."""
    return _hash_file(Path(file))


def _hash_file(file: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(1 << 22)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _read_memo(memo: Path) -> Mapping[str, _HashedFile]:
    try:
        with open_regular(memo) as file:
            return read_json(file, _MEMO, _CHECKSUM).files
    except (OSError, ValueError):
        return {}


def _write_memo(memo: Path, files: Mapping[str, _HashedFile]) -> None:
    """Replace the memo. Where it cannot be written, later runs only take longer."""
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(memo)  # also of a job that writes it now, which then only fails to remember
        content = {"format": 2, "files": {path: asdict(entry) for path, entry in files.items()}}
        with open_folder(memo.parent) as folder, folder.replacing(memo.name) as opened:
            opened.write(json.dumps(sealed(content, _CHECKSUM), indent=1).encode())
