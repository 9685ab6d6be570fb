"""Write segments to disk atomically, and read them without trusting them.

A segment is a folder with ``segment.safetensors`` (all tensors) and ``segment.json``, its manifest. The manifest is
written last, so a folder without it holds no segment.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import mlx.core as mx
from pydantic import Field, TypeAdapter

from turboquant.caches.prefix import Segment
from turboquant.io.atomic import Folder, IrregularFile, open_folder
from turboquant.io.identity import FORMAT_VERSION, Identity
from turboquant.io.json_file import check_json, check_seal, parse_json, read_bounded, sealed
from turboquant.io.safetensors import FileError, digest_file, load_tensors, save_tensors
from turboquant.io.safetensors_header import read_header
from turboquant.io.serialization import MALFORMED, freeze, restore_layer, restore_stock, take
from turboquant.mlx_lm.internals import STOCK_CACHES, KVCache, tokens_held
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.layer import EncodedLayer
from turboquant.runtime.versions import computing_versions

TENSORS, MANIFEST, CHECKSUM = "segment.safetensors", "segment.json", "manifest_checksum"
Count = Annotated[int, Field(ge=0, lt=1 << 48)]


class SegmentError(FileError):
    """A segment on disk cannot be used; the message is the reason in a few words."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of a segment, as its file holds it.

    parent: the key of the segment before it. start: number of tokens before it. about: facts about its origin, which
    are shown to people and explain why a segment is not found. layers: see ``_assemble``. bytes, checksum: of the file
    of tensors. versions: see ``computing_versions``; former releases wrote two of them. created: time in ISO format.
    """

    format_version: int
    key: str
    parent: str | None
    start: Count
    tokens: Count
    identity: Identity
    about: dict[str, str | bool]
    layers: list[Any]
    bytes: Count
    checksum: str
    versions: dict[str, str]
    created: str


_SCHEMA = TypeAdapter(Manifest)


def write_segment(
    folder: Path,
    key: str,
    segment: Segment,
    identity: Identity,
    parent: str | None = None,
    about: Mapping[str, str | bool] | None = None,
    root: Path | None = None,
) -> int:
    """Write a segment into ``folder`` atomically, and return the number of bytes written.

    key: its address, see ``Identity.key``. parent, about: see ``Manifest``. root: see ``open_folder``.

    Raises TypeError for a layer that cannot be stored, and OSError.
    """
    tensors, layers = _disassemble(segment)
    with open_folder(folder, root, make=True) as opened:
        with opened.replacing(TENSORS) as file:
            checksum, size = save_tensors(file, tensors)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            key=key,
            parent=parent,
            start=segment.start,
            tokens=segment.tokens,
            identity=identity,
            about=dict(about or {}),
            layers=layers,
            bytes=size,
            checksum=checksum,
            versions=dict(computing_versions()),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        text = json.dumps(sealed(dataclasses.asdict(manifest), CHECKSUM), indent=1).encode()
        with opened.replacing(MANIFEST) as file:
            file.write(text)
    return size + len(text)


def segment_bytes(segment: Segment) -> int:
    """Return the most bytes that ``write_segment`` needs for a segment, without those of ``about``."""
    tensors, layers = _disassemble(segment)
    return segment.nbytes + 256 * len(tensors) + 2 * len(json.dumps(layers, indent=1)) + 4096


def read_manifest(folder: Path, root: Path | None = None) -> Manifest:
    """Return the manifest of a segment, after the checks that need no tensors. Raises as ``read_segment`` does."""
    with _reading(), open_folder(folder, root) as opened:
        return _read_manifest(opened)


def read_segment(
    folder: Path,
    key: str,
    codec: CacheCodec,
    start: int = 0,
    most_bytes: int | None = None,
    root: Path | None = None,
) -> Segment:
    """Load a segment that stands behind ``start`` tokens, and verify every byte.

    most_bytes: that its tensors may have; nothing is allocated for larger ones. root: see ``open_folder``.

    Raises SegmentError if the segment was read and is wrong; OSError, RuntimeError or MemoryError if it cannot be read
    now, which says nothing about the segment.
    """
    with _reading(), open_folder(folder, root) as opened:
        manifest = _read_manifest(opened, key)
        if manifest.start != start:
            raise SegmentError(f"it stands behind {manifest.start} tokens, expected {start}")
        with _open_tensors(opened, manifest) as file:
            if most_bytes is not None and manifest.bytes > most_bytes:
                raise SegmentError(f"{manifest.bytes:,} bytes are more than {manifest.tokens} tokens can have")
            tensors, checksum = load_tensors(file)
            if checksum != manifest.checksum:
                raise SegmentError("checksum")
    try:
        segment = _assemble(tensors, manifest.layers, manifest.start, manifest.tokens, codec)
    except MALFORMED as error:
        raise SegmentError(f"the layers don't fit together: {error}") from None
    return dataclasses.replace(segment, versions=manifest.versions)


def verify_segment(folder: Path, key: str, root: Path | None = None) -> int:
    """Verify every byte of a segment without loading it, and return their count. Raises as ``read_segment`` does."""
    with _reading(), open_folder(folder, root) as opened:
        manifest = _read_manifest(opened, key)
        with _open_tensors(opened, manifest) as file:
            read_header(file)
            if digest_file(file) != manifest.checksum:
                raise SegmentError("checksum")
    return manifest.bytes


@contextmanager
def _reading() -> Iterator[None]:
    """Raise SegmentError for what is missing, malformed or no regular file or folder."""
    try:
        yield
    except FileNotFoundError:
        raise SegmentError("absent") from None
    except (IrregularFile, ValueError) as error:
        raise SegmentError(f"it cannot be read: {error}") from None


def _read_manifest(folder: Folder, key: str | None = None) -> Manifest:
    try:
        with folder.open(MANIFEST) as file:
            text = read_bounded(file)
        content = parse_json(text)
        if isinstance(content, dict) and content.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            version = ascii(content["format_version"])[:20]  # which may be any text
            raise SegmentError(f"format version {version}, expected {FORMAT_VERSION}")
        check_seal(content, CHECKSUM)
        manifest = check_json(text, _SCHEMA)
    except (IrregularFile, ValueError) as error:
        raise SegmentError(f"the manifest cannot be read: {error}") from None
    if key is not None and manifest.key != key:
        raise SegmentError("the manifest holds another segment's key")
    return manifest


@contextmanager
def _open_tensors(folder: Folder, manifest: Manifest) -> Iterator[BinaryIO]:
    try:
        with folder.open(TENSORS) as file:
            size = os.fstat(file.fileno()).st_size
            if size != manifest.bytes:
                raise SegmentError(f"{size} bytes of tensors, expected {manifest.bytes}")
            yield file
    except FileNotFoundError:
        raise SegmentError("the tensors are missing") from None
    except (IrregularFile, ValueError) as error:
        raise SegmentError(f"the tensors cannot be read: {error}") from None


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
