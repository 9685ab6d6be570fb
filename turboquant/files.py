"""Segments on disk: written so that a crash leaves nothing half, read as if by a stranger's hand.

A segment is a folder with ``segment.safetensors`` (all tensors) and ``segment.json`` (its manifest, written last: a
folder without one holds nothing). Knows a ``Prefix`` and its bytes; knows neither where segments live nor when they
are wanted. What kinds of layer a file may hold is a fixed list here, never a name taken from the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from turboquant.codec import CacheCodec
from turboquant.identity import FORMAT_VERSION, Identity
from turboquant.layer import EncodedLayer
from turboquant.prefix import Prefix

TENSORS, MANIFEST = "segment.safetensors", "segment.json"
STOCK_CACHES = {
    name: getattr(mlx_lm_cache, name) for name in ("KVCache", "RotatingKVCache", "ArraysCache", "ChunkedKVCache")
}
LARGEST_MANIFEST = 16 << 20


class SegmentError(Exception):
    """A segment on disk cannot be used; the message is the reason, in a few words."""


def write_segment(folder: Path, key: str, prefix: Prefix, identity: Identity, label: str = "") -> int:
    """Write a prefix into ``folder``, durably and all or nothing; returns the bytes written.

    label: what the segment was made from, kept to explain misses. Raises OSError as the disk does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, layers = _disassemble(prefix)
    temporary = folder / f".{uuid.uuid4().hex}.safetensors"
    with _removed_on_failure(temporary):
        mx.save_safetensors(str(temporary), tensors)
        checksum, size = _digest_and_sync(temporary)
        os.replace(temporary, folder / TENSORS)
    _sync_folder(folder)
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "parent": None,
        "tokens": prefix.tokens,
        "identity": dataclasses.asdict(identity),
        "label": label,
        "layers": layers,
        "bytes": size,
        "sha256": checksum,
        "versions": {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_text(folder / MANIFEST, json.dumps({**manifest, "manifest_sha256": _seal(manifest)}, indent=1))
    return size + (folder / MANIFEST).stat().st_size


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a segment, as far as it can be trusted without reading the tensors. Raises SegmentError."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise SegmentError("the manifest is too large")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        seal = _seal(manifest) if isinstance(manifest, dict) else None
    except FileNotFoundError:
        raise SegmentError("absent") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SegmentError(f"the manifest cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        raise SegmentError("the manifest is malformed")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise SegmentError(f"format version {version}, expected {FORMAT_VERSION}")
    if manifest.get("manifest_sha256") != seal:
        raise SegmentError("the manifest's checksum")
    return manifest


def read_segment(folder: Path, key: str, codec: CacheCodec) -> Prefix:
    """Load a prefix, every byte verified. Raises SegmentError with the reason where anything is wrong."""
    manifest = read_manifest(folder)
    if manifest.get("key") != key:
        raise SegmentError("the manifest holds another segment's key")
    try:
        with (folder / TENSORS).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != manifest.get("bytes"):
                raise SegmentError(f"{size} bytes of tensors, expected {manifest.get('bytes')}")
            if _digest(file) != manifest.get("sha256"):
                raise SegmentError("checksum")
            file.seek(0)
            tensors = mx.load(file, format="safetensors")
            assert isinstance(tensors, dict)
            mx.eval(tensors)
    except FileNotFoundError:
        raise SegmentError("the tensors are missing") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise SegmentError(f"the tensors cannot be read: {error}") from None
    try:
        return _assemble(tensors, manifest["layers"], manifest["tokens"], codec)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise SegmentError(f"the layers don't fit together: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Replace a file durably: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    with _removed_on_failure(temporary):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    _sync_folder(path.parent)


def _disassemble(prefix: Prefix) -> tuple[dict[str, mx.array], list[dict[str, Any]]]:
    """All tensors by name, and for each layer what is needed to put them together again."""
    tensors: dict[str, mx.array] = {}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(prefix.layers):
        if isinstance(layer, EncodedLayer):
            tensors |= {f"{index}.{name}": x for name, x in layer.tensors().items()}
            layers.append({"kind": "encoded"})
            continue
        kind = type(layer).__name__
        if STOCK_CACHES.get(kind) is not type(layer):
            raise TypeError(f"layer {index} is a {kind}, which cannot be stored")
        layers.append({"kind": kind, "state": _freeze(layer.state, f"{index}.state", tensors)})
    return tensors, layers


def _assemble(
    tensors: Mapping[str, mx.array], layers: Sequence[Mapping[str, Any]], tokens: int, codec: CacheCodec
) -> Prefix:
    if type(tokens) is not int or not isinstance(layers, list):
        raise TypeError("tokens is no number, or layers no list")
    assembled: list[Any] = []
    for index, layer in enumerate(layers):
        if layer["kind"] == "encoded":
            start = f"{index}."
            own = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
            encoded = EncodedLayer.from_tensors(own, codec.for_layer(index, len(layers)))
            held = encoded.tokens
            assembled.append(encoded)
        else:
            stock = STOCK_CACHES[layer["kind"]].from_state(_thaw(layer["state"], tensors))
            held = getattr(stock, "offset", tokens)  # recurrent states don't count their tokens
            assembled.append(stock)
        if held != tokens:
            raise ValueError(f"layer {index} holds {held} tokens, expected {tokens}")
    prefix = Prefix(tuple(assembled), tokens)
    _ = prefix.nbytes  # raises where a stock cache's state is no arrays
    return prefix


def _freeze(state: Any, name: str, tensors: dict[str, mx.array]) -> Any:
    """A cache's state as JSON; arrays go to ``tensors`` and leave their names."""
    if isinstance(state, mx.array):
        tensors[name] = state
        return {"tensor": name}
    if isinstance(state, (list, tuple)):
        return {"items": [_freeze(item, f"{name}.{i}", tensors) for i, item in enumerate(state)]}
    if state is None or isinstance(state, (bool, int, float, str)):
        return {"value": state}
    raise TypeError(f"{name} is a {type(state).__name__}, which cannot be stored")


def _thaw(state: Mapping[str, Any], tensors: Mapping[str, mx.array]) -> Any:
    if "tensor" in state:
        return tensors[state["tensor"]]
    if "items" in state:
        return [_thaw(item, tensors) for item in state["items"]]
    return state["value"]


def _seal(manifest: Mapping[str, Any]) -> str:
    """The checksum of a manifest, over everything in it but the checksum."""
    content = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _digest_and_sync(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        checksum = _digest(file)
        os.fsync(file.fileno())
        return checksum, file.tell()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Any:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
