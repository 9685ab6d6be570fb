"""Prompt caches that compress themselves: made for a model, from a filled cache, and kept in files.

The functions have the calls of mlx-lm's of the same names. Reading and writing is in
safetensors.py and serialization.py. A file is one ``.safetensors``, whose metadata holds a
sealed manifest: the format's version, each layer's kind and codec, and a checksum over all tensors.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from turboquant.caches.fork import Fork
from turboquant.caches.streaming import BLOCK, TurboQuantKVCache
from turboquant.io.atomic import replacing
from turboquant.io.safetensors import (
    FileError,
    digest_stored,
    digest_tensors,
    load_tensors,
    seal,
)
from turboquant.io.safetensors_header import parse_json, read_header
from turboquant.io.serialization import MALFORMED, freeze, restore_layer, restore_stock, take
from turboquant.kernels.encoding import encode_layer
from turboquant.mlx_lm.families import explain
from turboquant.mlx_lm.internals import STOCK_CACHES, KVCache, release
from turboquant.mlx_lm.internals import make_prompt_cache as make_stock_cache
from turboquant.quant.cache_codec import CacheCodec, dump_codec, parse_codec
from turboquant.quant.layer import EncodedLayer

FORMAT_VERSION = 1
MANIFEST = "0.turboquant"
# mlx-lm's load_prompt_cache takes metadata "2.1.*" for the kind of a scalar, and names a kind it does not know in its
# error: so this is what a user reads who gives it one of these files.
MARKER = "version"
FOR_MLX_LM = {
    "1.0": "TurboQuantKVCache",
    "2.0": "",
    "2.1.0": MARKER,
    "2.1.1": "(this is a prompt cache of turboquant's: load it with turboquant.load_prompt_cache)",
}


class PromptCacheError(FileError):
    """A file holds no prompt cache that can be used; the message names the file and says why."""


def make_prompt_cache(model: Any, codec: CacheCodec | None = None) -> list[Any]:
    """A new cache for ``model``: its own, but ``TurboQuantKVCache`` for each layer that can be compressed.

    To be used inside of ``enabled(model)``; ``families.explain(model)`` says why a layer is not compressed.
    """
    codec, caches = codec or CacheCodec(), make_stock_cache(model)
    return [
        TurboQuantKVCache(codec.for_layer(index, len(caches))) if compressible else cache
        for index, (compressible, cache) in enumerate(zip(explain(model).layers, caches, strict=True))
    ]


def compress(prompt_cache: Sequence[Any], codec: CacheCodec | None = None, model: Any = None) -> list[Any]:
    """Caches to go on with in place of a filled cache of mlx-lm's (one row), which is emptied layer by layer.

    A plain ``KVCache`` becomes a ``TurboQuantKVCache`` with all but its window encoded about the means of what it
    holds, and goes on compressing about those as it grows. (``Prefix.encode`` makes a past that many queries share,
    whose forks add to it in full precision.) Other caches are handed back as they are, and so are with ``model`` the
    layers that cannot be compressed in it: give it, unless you know that every plain layer can. Raises ValueError
    where a layer to be compressed holds several rows.
    """
    codec = codec or CacheCodec()
    n_layers = len(prompt_cache)
    allowed = explain(model).layers if model is not None else [True] * n_layers
    plain = [yes and isinstance(c, KVCache) for yes, c in zip(allowed, prompt_cache, strict=True)]
    for index, cache in enumerate(prompt_cache):
        if plain[index] and not cache.empty() and cache.keys.shape[0] != 1:
            raise ValueError(f"layer {index} holds {cache.keys.shape[0]} rows; compress each row's cache by itself")
    return [
        _compressed(cache, codec.for_layer(index, n_layers)) if plain[index] else cache
        for index, cache in enumerate(prompt_cache)
    ]


def save_prompt_cache(
    path: str | os.PathLike[str], cache: Sequence[Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a prompt cache to exactly ``path``, durably and all or nothing.

    cache: any mix of ``TurboQuantKVCache``, ``Fork`` (its past is written with it) and mlx-lm's ``KVCache``,
    ``RotatingKVCache``, ``ArraysCache`` and ``ChunkedKVCache``. Raises TypeError for others, and for metadata that is
    not text; OSError as the disk does.
    """
    metadata = metadata or {}
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise TypeError("a prompt cache's metadata maps text to text")
    tensors: dict[str, mx.array] = {MARKER: mx.array([FORMAT_VERSION], mx.uint8)}
    layers = [_disassemble(index, one, tensors) for index, one in enumerate(cache)]
    tensors = {name: mx.contiguous(x) for name, x in tensors.items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "layers": layers,
        "metadata": dict(metadata),
        "checksum": digest_tensors(tensors),
        "versions": {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")},
    }
    text = json.dumps({**manifest, "manifest_checksum": seal(manifest)})
    with replacing(Path(path), ending=".safetensors") as temporary:  # MLX adds the ending where it lacks
        mx.save_safetensors(str(temporary), tensors, {MANIFEST: text, **FOR_MLX_LM})


def load_prompt_cache(path: str | os.PathLike[str], return_metadata: bool = False) -> Any:
    """The caches that ``save_prompt_cache`` wrote, every byte verified; with ``return_metadata``, (caches, metadata).

    They go on exactly as the saved ones would have. Raises PromptCacheError where the file is damaged, forged, of
    another version or of another program; OSError as the disk does.
    """
    try:
        with Path(path).open("rb") as file:
            manifest, tensors = _read(file)
        caches = _assemble(manifest["layers"], tensors)
        metadata: dict[str, str] = manifest["metadata"]
    except (*MALFORMED, RuntimeError) as error:
        raise PromptCacheError(f"{os.fspath(path)}: {error}") from None
    return (caches, metadata) if return_metadata else caches


def _compressed(cache: KVCache, codec: CacheCodec) -> TurboQuantKVCache:
    """The cache compressed, but for its window; empties it. Too short a cache is compressed once it has grown."""
    compressed = TurboQuantKVCache(codec)
    if cache.empty():
        return compressed
    keys, values = cache.keys_and_values()
    last = cache.offset - codec.window
    if last >= codec.sinks + BLOCK:
        without_window = replace(codec, window=0)
        compressed.layer = encode_layer(keys[0, :, :last], values[0, :, :last], without_window)
        keys, values = keys[:, :, last:], values[:, :, last:]
    if keys.shape[2]:
        compressed.suffix.update_and_fetch(keys, values)
        mx.eval(compressed.suffix.state)
    release(cache)
    return compressed


def _disassemble(index: int, cache: Any, tensors: dict[str, mx.array]) -> dict[str, Any]:
    """What is needed to put a layer's cache together again; its arrays go to ``tensors``."""
    kind = type(cache).__name__
    if STOCK_CACHES.get(kind) is type(cache):
        state = _used(cache) if kind == "KVCache" else cache.state
        return {"kind": kind, "state": freeze(state, f"{index}.state", tensors)}
    past = getattr(cache, "layer", None)
    expected = {Fork: EncodedLayer, TurboQuantKVCache: EncodedLayer | None}.get(type(cache))
    if expected is None or not isinstance(past, expected):
        raise TypeError(f"layer {index} is a {kind} that cannot be stored: of a batch, extract the rows")
    if past is not None:
        tensors |= {f"{index}.past.{name}": x for name, x in past.tensors().items()}
    return {
        "kind": "turboquant" if isinstance(cache, TurboQuantKVCache) else "fork",
        "codec": json.loads(dump_codec(getattr(cache, "codec", None) or cache.layer.codec)),
        "tokens": cache.offset,
        "suffix": freeze(_used(cache.suffix), f"{index}.suffix", tensors),
    }


def _used(cache: KVCache) -> Any:
    """The state of a cache without the unused end of its buffers."""
    return (None, None, 0) if cache.empty() else (*cache.keys_and_values(), cache.offset)


def _read(file: BinaryIO) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """The manifest and the tensors of a file, none of whose bytes are what they were not when it was written."""
    header, texts = read_header(file)
    if MANIFEST not in texts:
        if texts.keys() & FOR_MLX_LM.keys():
            raise ValueError("a prompt cache of mlx-lm's: load it with mlx_lm.models.cache.load_prompt_cache")
        raise ValueError("no prompt cache: the file has no manifest of turboquant's")
    manifest = parse_json(texts.pop(MANIFEST).encode())
    if not isinstance(manifest, dict):
        raise ValueError("the manifest is no mapping")
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"format version {version}, expected {FORMAT_VERSION}: prefill the prompt again")
    if texts != FOR_MLX_LM or manifest.get("manifest_checksum") != seal(manifest):
        raise ValueError("the manifest's checksum is wrong: the file is damaged, prefill the prompt again")
    metadata = manifest.get("metadata")
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("the metadata is no mapping of text")
    if digest_stored(file, header) != manifest.get("checksum"):
        raise ValueError("the tensors' checksum is wrong: the file is damaged, prefill the prompt again")
    return manifest, load_tensors(file)[0]


def _assemble(layers: Any, tensors: dict[str, mx.array]) -> list[Any]:
    if not isinstance(layers, list):
        raise ValueError("the layers are no list")
    if tensors.pop(MARKER).tolist() != [FORMAT_VERSION]:
        raise ValueError("the tensors are of another version than the manifest")
    caches = []
    for index, layer in enumerate(layers):
        own = take(f"{index}.", tensors)
        try:
            caches.append(_restored(layer, index, own))
        except MALFORMED as error:
            raise ValueError(f"layer {index} does not fit together: {error}") from None
        if own:
            raise ValueError(f"layer {index} has no use for {sorted(own)}")
    if tensors:
        raise ValueError(f"no layer has a use for {sorted(tensors)}")
    return caches


def _restored(layer: Mapping[str, Any], index: int, tensors: dict[str, mx.array]) -> Any:
    """A layer's cache from what ``_disassemble`` noted; takes out of ``tensors`` what it uses."""
    if layer["kind"] not in ("turboquant", "fork"):
        return restore_stock(layer["kind"], layer["state"], tensors)
    codec, streaming = parse_codec(layer["codec"]), layer["kind"] == "turboquant"
    suffix = restore_stock("KVCache", layer["suffix"], tensors)
    past = None
    if tensors or not streaming:
        past = restore_layer(f"{index}.past.", tensors, replace(codec, window=0) if streaming else codec)
    _check_fit(past, suffix, streaming)
    cache = TurboQuantKVCache(codec) if streaming else Fork(past)
    cache.layer, cache.suffix = past, suffix
    if type(layer["tokens"]) is not int or cache.offset != layer["tokens"]:
        raise ValueError(f"{cache.offset} tokens, expected {layer['tokens']}")
    return cache


def _check_fit(past: EncodedLayer | None, suffix: KVCache, streaming: bool) -> None:
    keys, values = suffix.keys, suffix.values
    if keys is not None and keys.shape[0] != 1:
        raise ValueError(f"a suffix of {keys.shape[0]} rows")
    if past is None:
        return
    if past.sink_keys.shape[1] > past.codec.sinks or (streaming and past.fine_keys.tokens):
        raise ValueError("more sinks than the codec has, or finer tokens where they would not stay the latest")
    ours = [(mean.shape[0], mean.shape[2]) for mean in (past.key_mean, past.value_mean)]
    if keys is not None and [(x.shape[1], x.shape[3]) for x in (keys, values)] != ours:
        raise ValueError("the suffix is of other heads than the past")
