"""Write segments to disk atomically, and read them without trusting them.

A segment is a folder with ``segment.safetensors`` (all tensors) and ``segment.json``, its manifest. The manifest is
written last, so a folder without it holds no segment.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from turboquant.caches.prefix import Segment
from turboquant.io.atomic import IrregularFile, open_regular, replacing
from turboquant.io.identity import FORMAT_VERSION, Identity
from turboquant.io.json_file import parse_json, seal, sealed
from turboquant.io.safetensors import FileError, digest_file, load_tensors, save_tensors
from turboquant.io.safetensors_header import read_header
from turboquant.io.serialization import MALFORMED, freeze, restore_layer, restore_stock, take
from turboquant.mlx_lm.internals import STOCK_CACHES, KVCache, tokens_held
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.layer import EncodedLayer

TENSORS, MANIFEST, CHECKSUM = "segment.safetensors", "segment.json", "manifest_checksum"
LARGEST_MANIFEST = 16 << 20


class SegmentError(FileError):
    """A segment on disk cannot be used; the message is the reason in a few words."""


def write_segment(
    folder: Path,
    key: str,
    segment: Segment,
    identity: Identity,
    parent: str | None = None,
    about: Mapping[str, str | bool] | None = None,
) -> int:
    """Write a segment into ``folder`` atomically, and return the number of bytes written.

    key: its address, see ``Identity.key``. parent: the key of the segment before it.
    about: facts about its origin, which are shown to people and explain why a segment is not found.

    Raises TypeError for a layer that cannot be stored, and OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, layers = _disassemble(segment)
    with replacing(folder / TENSORS) as temporary:
        checksum, size = save_tensors(temporary, tensors)
    manifest = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "parent": parent,
        "start": segment.start,
        "tokens": segment.tokens,
        "identity": dataclasses.asdict(identity),
        "about": dict(about or {}),
        "layers": layers,
        "bytes": size,
        "checksum": checksum,
        "versions": {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    with replacing(folder / MANIFEST) as temporary:
        text = json.dumps(sealed(manifest, CHECKSUM), indent=1)
        temporary.write_text(text, encoding="utf-8")
    return size + (folder / MANIFEST).stat().st_size


def segment_bytes(segment: Segment) -> int:
    """Return the most bytes that ``write_segment`` needs for a segment, without those of ``about``."""
    tensors, layers = _disassemble(segment)
    return segment.nbytes + 256 * len(tensors) + 2 * len(json.dumps(layers, indent=1)) + 4096


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a segment, after the checks that need no tensors. Raises SegmentError and OSError."""
    path = folder / MANIFEST
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST_MANIFEST:
                raise SegmentError("the manifest is too large")
            manifest = parse_json(file.read())
        checksum = seal(manifest, CHECKSUM) if isinstance(manifest, dict) else None
    except FileNotFoundError:
        raise SegmentError("absent") from None
    except (IrregularFile, ValueError) as error:
        raise SegmentError(f"the manifest cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        raise SegmentError("the manifest is malformed")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise SegmentError(f"format version {version}, expected {FORMAT_VERSION}")
    if manifest.get(CHECKSUM) != checksum:
        raise SegmentError("the manifest's checksum")
    return manifest


def read_segment(folder: Path, key: str, codec: CacheCodec, start: int = 0) -> Segment:
    """Load a segment that stands behind ``start`` tokens, and verify every byte.

    Raises SegmentError if the segment was read and is wrong; OSError, RuntimeError or MemoryError if it cannot be read
    now, which says nothing about the segment.
    """
    manifest = read_manifest(folder)
    if manifest.get("key") != key:
        raise SegmentError("the manifest holds another segment's key")
    if manifest.get("start") != start:
        raise SegmentError(f"it stands behind {manifest.get('start')} tokens, expected {start}")
    try:
        with open_regular(folder / TENSORS) as file:
            _check_size(file, manifest)
            tensors, checksum = load_tensors(file)
            if checksum != manifest.get("checksum"):
                raise SegmentError("checksum")
    except FileNotFoundError:
        raise SegmentError("the tensors are missing") from None
    except (IrregularFile, ValueError) as error:
        raise SegmentError(f"the tensors cannot be read: {error}") from None
    try:
        return _assemble(tensors, manifest["layers"], manifest["start"], manifest["tokens"], codec)
    except MALFORMED as error:
        raise SegmentError(f"the layers don't fit together: {error}") from None


def verify_segment(folder: Path, key: str) -> int:
    """Verify every byte of a segment without loading it, and return their count. Raises like ``read_segment``."""
    manifest = read_manifest(folder)
    if manifest.get("key") != key:
        raise SegmentError("the manifest holds another segment's key")
    try:
        with open_regular(folder / TENSORS) as file:
            size = _check_size(file, manifest)
            read_header(file)
            if digest_file(file) != manifest.get("checksum"):
                raise SegmentError("checksum")
            return size
    except FileNotFoundError:
        raise SegmentError("the tensors are missing") from None
    except (IrregularFile, ValueError) as error:
        raise SegmentError(f"the tensors cannot be read: {error}") from None


def _check_size(file: BinaryIO, manifest: Mapping[str, Any]) -> int:
    size = os.fstat(file.fileno()).st_size
    if size != manifest.get("bytes"):
        raise SegmentError(f"{size} bytes of tensors, expected {manifest.get('bytes')}")
    return size


def _disassemble(segment: Segment) -> tuple[dict[str, mx.array], list[dict[str, Any]]]:
    """Return all tensors by name, and a description of each layer with which ``_assemble`` restores it."""
    tensors: dict[str, mx.array] = {}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(segment.layers):
        if isinstance(layer, EncodedLayer):
            tensors |= {f"{index}.{name}": x for name, x in layer.tensors().items()}
            layers.append({"kind": "encoded"})
            continue
        kind = type(layer).__name__
        if STOCK_CACHES.get(kind) is not type(layer):
            raise TypeError(f"layer {index} is a {kind}, which cannot be stored")
        layers.append({"kind": kind, "state": freeze(layer.state, f"{index}.state", tensors)})
    return tensors, layers


def _assemble(
    tensors: dict[str, mx.array], layers: Sequence[Mapping[str, Any]], start: int, tokens: int, codec: CacheCodec
) -> Segment:
    if type(start) is not int or type(tokens) is not int or not isinstance(layers, list):
        raise TypeError("start or tokens is not a number, or layers is not a list")
    assembled: list[Any] = []
    for index, layer in enumerate(layers):
        own = take(f"{index}.", tensors)
        if layer["kind"] == "encoded":
            encoded = restore_layer(f"{index}.", own, codec.for_layer(index, len(layers)))
            held, expected = {encoded.tokens}, tokens
            assembled.append(encoded)
        else:
            stock = restore_stock(layer["kind"], layer["state"], own)
            held, expected = tokens_held(stock), tokens if type(stock) is KVCache else start + tokens
            assembled.append(stock)
        if held - {expected}:
            raise ValueError(f"layer {index} holds {held - {expected}} tokens, expected {expected}")
        if own:
            raise ValueError(f"layer {index} has no use for {sorted(own)}")
    if tensors:
        raise ValueError(f"no layer has a use for {sorted(tensors)}")
    return Segment(tuple(assembled), start, tokens)
