"""Make prompt caches that compress themselves, for a model or from a filled cache, and keep them in files.

The functions are called like mlx-lm's functions of the same names. A file is one ``.safetensors``. Its metadata holds a
manifest, with a checksum of its own: the version of the format, each layer's kind and codec, and a checksum over all
tensors.
"""

from __future__ import annotations

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
from turboquant.io.json_file import parse_json, seal, sealed
from turboquant.io.safetensors import FileError, digest_stored, digest_tensors, load_tensors
from turboquant.io.safetensors_header import read_header
from turboquant.io.serialization import MALFORMED, freeze, restore_layer, restore_stock, take
from turboquant.kernels.encoding import encode_layer, require_finite
from turboquant.mlx_lm.families import explain
from turboquant.mlx_lm.internals import STOCK_CACHES, KVCache, release
from turboquant.mlx_lm.internals import make_prompt_cache as make_stock_cache
from turboquant.quant.cache_codec import CacheCodec, dump_codec, parse_codec
from turboquant.quant.layer import EncodedLayer
from turboquant.runtime.device import host_copies
from turboquant.runtime.versions import computing_versions

FORMAT_VERSION = 1
MANIFEST, CHECKSUM = "0.turboquant", "manifest_checksum"
# A user who loads one of these files with mlx-lm's load_prompt_cache reads this text: mlx-lm takes metadata "2.1.*" for
# the kind of a scalar, and its error quotes a kind that it does not know.
MARKER = "version"
FOR_MLX_LM = {
    "1.0": "TurboQuantKVCache",
    "2.0": "",
    "2.1.0": MARKER,
    "2.1.1": "(this is a prompt cache of turboquant: load it with turboquant.load_prompt_cache)",
}


class PromptCacheError(FileError):
    """A file cannot be used as a prompt cache; the message names the file and the reason."""


def make_prompt_cache(model: Any, codec: CacheCodec | None = None) -> list[Any]:
    """Return an empty cache for ``model``, with a ``TurboQuantKVCache`` for each layer that can be compressed.

    Layers to which ``codec`` gives 16 bits have mlx-lm's own cache. Use it inside of ``enabled(model)``.
    ``families.explain(model)`` tells why a layer is not compressed. Raises ValueError for a codec that a
    ``TurboQuantKVCache`` cannot have, or whose ``layer_bits`` name a layer that the model does not have.
    """
    stock = make_stock_cache(model)
    ours = _growing(codec or CacheCodec(), explain(model).layers)
    return [cache if one is None else one for cache, one in zip(stock, ours, strict=True)]


def compress(prompt_cache: Sequence[Any], codec: CacheCodec | None = None, model: Any = None) -> list[Any]:
    """Return compressed caches in place of a filled cache of mlx-lm's (one row), which is emptied layer by layer.

    A plain ``KVCache`` becomes a ``TurboQuantKVCache`` in which everything except its window is encoded, and which
    continues to compress itself about the same means as it grows. (For a past that many queries share, use
    ``Prefix.encode``.) Other caches, and layers to which ``codec`` gives 16 bits, are returned unchanged.

    model: the model of the cache. Its layers that cannot be compressed are returned unchanged too. Leave it out only if
        you know that every plain layer can be compressed.

    Raises ValueError, before any layer is emptied, for a codec that ``make_prompt_cache`` refuses, and where a layer to
    be compressed holds several rows or numbers that are not finite.
    """
    allowed = explain(model).layers if model is not None else [True] * len(prompt_cache)
    plain = [yes and isinstance(cache, KVCache) for yes, cache in zip(allowed, prompt_cache, strict=True)]
    ours = _growing(codec or CacheCodec(), plain)
    for index, (cache, one) in enumerate(zip(prompt_cache, ours, strict=True)):
        if one is not None and not cache.empty():
            if cache.keys.shape[0] != 1:
                raise ValueError(f"layer {index} holds {cache.keys.shape[0]} rows; compress each row's cache by itself")
            require_finite(*cache.keys_and_values())
    return [cache if one is None else _filled(one, cache) for cache, one in zip(prompt_cache, ours, strict=True)]


def save_prompt_cache(
    path: str | os.PathLike[str], cache: Sequence[Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a prompt cache atomically to exactly ``path``.

    cache: any mix of ``TurboQuantKVCache``, ``Fork`` (which is written with its past) and mlx-lm's ``KVCache``,
        ``RotatingKVCache``, ``ArraysCache``, ``ChunkedKVCache`` and ``CacheList``.

    Raises TypeError for other caches and for metadata that is not text, and OSError.
    """
    metadata = metadata or {}
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise TypeError("a prompt cache's metadata maps text to text")
    tensors: dict[str, mx.array] = {MARKER: mx.array([FORMAT_VERSION], mx.uint8)}
    layers = [_disassemble(index, one, tensors) for index, one in enumerate(cache)]
    tensors = host_copies({name: mx.contiguous(x) for name, x in tensors.items()})
    manifest = {
        "format_version": FORMAT_VERSION,
        "layers": layers,
        "metadata": dict(metadata),
        "checksum": digest_tensors(tensors),
        "versions": dict(computing_versions()),
    }
    text = json.dumps(sealed(manifest, CHECKSUM))
    with replacing(Path(path), ending=".safetensors") as temporary:  # MLX adds the ending where it lacks
        mx.save_safetensors(str(temporary), tensors, {MANIFEST: text, **FOR_MLX_LM})


def load_prompt_cache(path: str | os.PathLike[str], return_metadata: bool = False) -> Any:
    """Load the caches that ``save_prompt_cache`` wrote, and verify every byte.

    Returns the caches, or (caches, metadata) with ``return_metadata``. They continue exactly as the saved caches would.
    Raises PromptCacheError where the file is damaged, forged, of another version or of another program, and OSError.
    """
    try:
        with Path(path).open("rb") as file:
            manifest, tensors = _read(file)
        caches = _assemble(manifest["layers"], tensors)
        metadata: dict[str, str] = manifest["metadata"]
    except (*MALFORMED, RuntimeError) as error:
        raise PromptCacheError(f"{os.fspath(path)}: {error}") from None
    return (caches, metadata) if return_metadata else caches


def _growing(codec: CacheCodec, compressible: Sequence[bool]) -> list[TurboQuantKVCache | None]:
    """Return an empty cache for each layer, or None where it is not to be compressed."""
    codecs = [codec.for_layer(index, len(compressible)) for index in range(len(compressible))]
    return [
        TurboQuantKVCache(own) if yes and not own.is_uncompressed else None
        for own, yes in zip(codecs, compressible, strict=True)
    ]


def _filled(compressed: TurboQuantKVCache, cache: KVCache) -> TurboQuantKVCache:
    """Encode the tokens before the window into an empty cache, if there are enough, and empty the given one."""
    if cache.empty():
        return compressed
    codec = compressed.codec
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
    """Return a description of a layer's cache for ``_restored``, and add its arrays to ``tensors``."""
    kind = type(cache).__name__
    if STOCK_CACHES.get(kind) is type(cache):
        state = _used(cache) if kind == "KVCache" else cache.state
        return {"kind": kind, "state": freeze(state, f"{index}.state", tensors)}
    past = getattr(cache, "layer", None)
    expected = {Fork: EncodedLayer, TurboQuantKVCache: EncodedLayer | None}.get(type(cache))
    if expected is None or not isinstance(past, expected):
        raise TypeError(f"layer {index} is a {kind} that cannot be stored; of a batch, extract the rows and store each")
    if past is not None:
        tensors |= {f"{index}.past.{name}": x for name, x in past.tensors().items()}
    return {
        "kind": "turboquant" if isinstance(cache, TurboQuantKVCache) else "fork",
        "codec": json.loads(dump_codec(getattr(cache, "codec", None) or cache.layer.codec)),
        "tokens": cache.offset,
        "suffix": freeze(_used(cache.suffix), f"{index}.suffix", tensors),
    }


def _used(cache: KVCache) -> Any:
    """Return the state of a cache without the unused end of its buffers."""
    return (None, None, 0) if cache.empty() else (*cache.keys_and_values(), cache.offset)


def _read(file: BinaryIO) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Return the manifest and the tensors of a file, after verifying that no byte of it has changed."""
    header, texts = read_header(file)
    if MANIFEST not in texts:
        if texts.keys() & FOR_MLX_LM.keys():
            raise ValueError("it is a prompt cache of mlx-lm: load it with mlx_lm.models.cache.load_prompt_cache")
        raise ValueError("it is not a prompt cache: the file has no manifest of turboquant")
    manifest = parse_json(texts.pop(MANIFEST).encode())
    if not isinstance(manifest, dict):
        raise ValueError("the manifest is not a mapping")
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"format version {ascii(version)[:20]}, expected {FORMAT_VERSION}: prefill the prompt again")
    if texts != FOR_MLX_LM or manifest.get(CHECKSUM) != seal(manifest, CHECKSUM):
        raise ValueError("the manifest's checksum is wrong: the file is damaged, prefill the prompt again")
    metadata = manifest.get("metadata")
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("the metadata is not a mapping of text")
    if digest_stored(file, header) != manifest.get("checksum"):
        raise ValueError("the tensors' checksum is wrong: the file is damaged, prefill the prompt again")
    return manifest, load_tensors(file)[0]


def _assemble(layers: Any, tensors: dict[str, mx.array]) -> list[Any]:
    if not isinstance(layers, list):
        raise ValueError("the layers are not a list")
    if tensors.pop(MARKER).tolist() != [FORMAT_VERSION]:
        raise ValueError("the tensors and the manifest have different versions")
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
    """Return a layer's cache from its description, and remove its arrays from ``tensors``."""
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
    too_many = not past.codec.is_uncompressed and past.sink_keys.shape[1] > past.codec.sinks
    if too_many or (streaming and past.fine_keys.tokens):
        raise ValueError("the past has more sinks than its codec, or finer tokens, which a growing cache cannot have")
    ours = [(mean.shape[0], mean.shape[2]) for mean in (past.key_mean, past.value_mean)]
    if keys is not None and [(x.shape[1], x.shape[3]) for x in (keys, values)] != ours:
        raise ValueError("the suffix has other heads than the past")
