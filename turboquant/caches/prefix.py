"""The compressed K/V of a context: computed once, and shared by all queries about it.

    Prefix           the compressed K/V of a whole context; forked once for each query
    Segment          the compressed K/V of a run of its tokens; a prefix is a chain of segments
    prefill          builds a prefix in one go
    prefill_segment  builds one segment, behind the segments before it
    join             makes a prefix from a chain of segments

What many contexts begin with is prefilled once, and a context that grows needs only a segment for its new tokens. The
codes of a segment depend only on its own tokens and those of the segments before it, never on when it was built. The
model attends to the tokens of the segment in full precision, and to those before it compressed; the segment is encoded
as soon as it is complete.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from turboquant.attention.dispatch import attend_past, backend, has_kernel, implementation
from turboquant.attention.reference import finish, merge
from turboquant.caches.fork import Fork, Mask
from turboquant.kernels.encoding import encode_layer
from turboquant.mlx_lm.cpu_functions import numpy_functions
from turboquant.mlx_lm.dequantized_products import dequantized_products
from turboquant.mlx_lm.families import explain
from turboquant.mlx_lm.internals import KVCache, allocate_once, kv_cache, make_prompt_cache, release
from turboquant.mlx_lm.patch import enabled
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.layer import DenseLayer, EncodedLayer
from turboquant.quant.query_stats import QueryCollector
from turboquant.runtime.device import on_cpu

DENSE_BYTES = 2 << 30  # the memory for decoded prefixes on a CPU
DENSE_SHARE = 8  # on a GPU, decoded prefixes may take one part in this many of the device's memory


@dataclass(frozen=True)
class Prefix:
    """The compressed K/V of a context, immutable.

    layers: one entry for each layer of the model: an ``EncodedLayer`` (or, decoded, a ``DenseLayer``), which all forks
        share, or a cache of mlx-lm's for a layer that is not compressed (sliding-window, recurrent and others), which
        is copied for each fork.
    tokens: the number of tokens of the context.
    """

    layers: tuple[Any, ...]
    tokens: int

    @classmethod
    def encode(
        cls,
        prompt_cache: Sequence[Any],
        tokens: int,
        codec: CacheCodec,
        compressible: Sequence[bool] | None = None,
    ) -> Prefix:
        """Compress a prompt cache of one row that holds ``tokens`` tokens, and empty its compressed layers.

        compressible: which layers to compress, see ``families.explain``; all plain K/V layers if None.

        The queries that a ``PrefillCache`` has collected help to encode it. Layers are emptied one by one, so that the
        memory never holds the whole context twice. Raises ValueError where a K/V layer does not hold ``tokens`` tokens
        of one row, or ``codec`` names layers that there are not; and where K/V are not finite, which is found when the
        layers before are empty.
        """
        codec.check_layers(len(prompt_cache))
        _check_filled(prompt_cache, tokens)
        return cls(_encode(prompt_cache, codec, compressible or [True] * len(prompt_cache), None), tokens)

    def fork(self) -> list[Any]:
        """Return a prompt cache for one query. For a compressed layer this takes O(1), whatever its length."""
        return [Fork(x) if isinstance(x, EncodedLayer | DenseLayer) else copy.deepcopy(x) for x in self.layers]

    def dense(self, dtype: mx.Dtype) -> Prefix:
        """Return the same prefix with its compressed layers decoded: faster to attend, several times larger."""
        layers = [x.dense(dtype) if isinstance(x, EncodedLayer) else x for x in self.layers]
        return Prefix(tuple(layers), self.tokens)

    @property
    def is_dense(self) -> bool:
        """Whether its compressed layers are decoded."""
        return any(isinstance(layer, DenseLayer) for layer in self.layers)

    @property
    def attended_by(self) -> str:
        """The implementation that attends its compressed layers here, see ``dispatch.implementation``."""
        return implementation(layer for layer in self.layers if isinstance(layer, EncodedLayer | DenseLayer))

    @property
    def dense_elements(self) -> int:
        """How many numbers ``dense`` holds in the layers that it decodes."""
        encoded = [layer for layer in self.layers if isinstance(layer, EncodedLayer)]
        per_token = sum(x.key_mean.size + x.value_mean.size for x in encoded)
        return self.tokens * per_token

    @property
    def nbytes(self) -> int:
        """The bytes of all layers."""
        return sum(int(layer.nbytes) for layer in self.layers)

    @property
    def effective_bits(self) -> float:
        """The mean number of bits for one coordinate in the compressed layers, with everything counted."""
        encoded = [layer for layer in self.layers if isinstance(layer, EncodedLayer)]
        return sum(layer.effective_bits for layer in encoded) / max(1, len(encoded))


@dataclass(frozen=True)
class Segment:
    """The compressed K/V of a run of ``tokens`` tokens, which stand behind ``start`` other tokens.

    layers: one entry for each layer of the model: an ``EncodedLayer`` or a plain ``KVCache`` of the segment's own
        tokens, or another cache of mlx-lm's in its state after the last of them.
    versions: of what computed a segment that was read from disk, by name, as far as they were recorded.
    """

    layers: tuple[Any, ...]
    start: int
    tokens: int
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        """The number of tokens up to the segment's end, with those before it."""
        return self.start + self.tokens

    @property
    def nbytes(self) -> int:
        """The bytes of all layers."""
        return sum(int(layer.nbytes) for layer in self.layers)


# ---- prefill


def prefill(
    model: Any,
    tokens: Sequence[int],
    codec: CacheCodec,
    chunk: int = 512,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Prefix:
    """Build the prefix of a context. See ``prefill_segment`` for the arguments."""
    return join([prefill_segment(model, tokens, codec, None, chunk, on_progress)])


def prefill_segment(
    model: Any,
    tokens: Sequence[int],
    codec: CacheCodec,
    parent: Prefix | None = None,
    chunk: int = 512,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Segment:
    """Run tokens through a model behind the prefix ``parent``, and compress their K/V.

    chunk: how many tokens the model is given in one step.
    on_progress: called after each chunk with its number of tokens; an exception that it raises ends the prefill.

    Raises ValueError before the model runs if there are no tokens, if ``codec`` does not suit the model, or if
    ``parent`` is decoded or of another codec; and afterwards if K/V are not finite.
    """
    compressible, count = explain(model).layers, len(tokens)
    if not count:
        raise ValueError("a segment has one token or more")
    codec.check_layers(len(compressible))
    if parent is None:
        caches = prefill_caches(model, count, compressible)
    else:
        _check_parent(parent, codec)
        (attended,) = make_resident([parent], "dense" if dense_fits([parent]) else "packed")
        caches = [
            SegmentCache(layer, count) if isinstance(layer, EncodedLayer | DenseLayer) else copy.deepcopy(layer)
            for layer in attended.layers
        ]
    with enabled(model), numpy_functions(model), dequantized_products():
        feed(model, caches, tokens, chunk, on_progress)
    if parent is None:
        _check_filled(caches, count)
    layers = _encode(caches, codec, compressible, parent)
    return Segment(layers, parent.tokens if parent is not None else 0, count)


def _check_parent(parent: Prefix, codec: CacheCodec) -> None:
    if parent.is_dense:
        raise ValueError("a segment stands behind an encoded prefix, not a decoded one: give the prefix before `dense`")
    for index, layer in enumerate(parent.layers):
        if isinstance(layer, EncodedLayer):
            layer.check_codec(codec.for_layer(index, len(parent.layers)))


def prefill_caches(model: Any, tokens: int, compressible: Sequence[bool]) -> list[Any]:
    """Return empty full-precision caches for ``tokens`` tokens: a ``PrefillCache`` for each layer to be compressed."""
    stock = make_prompt_cache(model)
    return [PrefillCache(tokens) if yes else cache for yes, cache in zip(compressible, stock, strict=True)]


def feed(
    model: Any,
    caches: Sequence[Any],
    tokens: Sequence[int],
    chunk: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Run tokens through a model into caches of any kind. See ``prefill_segment`` for the arguments."""
    for start in range(0, len(tokens), chunk):
        chunk_tokens = list(tokens[start : start + chunk])
        model(mx.array(chunk_tokens)[None], cache=caches)
        mx.eval([cache.state for cache in caches])  # the logits are not needed, so they are never computed
        mx.clear_cache()
        on_progress(len(chunk_tokens))


class PrefillCache(KVCache):  # type: ignore[misc]
    """One layer's full-precision cache of a context that is being prefilled.

    capacity: the number of tokens of the context.

    ``queries`` collects statistics of the context's own queries, with which the layer is encoded.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        allocate_once(self, capacity)
        self.queries = QueryCollector(capacity)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        """Return causal attention of the chunk that was added last over all tokens in the cache."""
        self.queries.add(queries, keys.shape[1], self.offset - queries.shape[2], scale)
        if not on_cpu():
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        return finish(backend().attend_dense(queries, keys, values, scale, mask), sinks, queries.dtype)


class SegmentCache(Fork):
    """One layer's full-precision cache of a segment that is being prefilled behind a compressed parent.

    ``queries`` collects statistics of the segment's own queries, with which the layer is encoded.
    """

    def __init__(self, parent: EncodedLayer | DenseLayer, capacity: int) -> None:
        super().__init__(parent)
        allocate_once(self.suffix, capacity)
        self.queries = QueryCollector(capacity)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        """Return attention of the chunk that was added last over the parent and all tokens in the cache."""
        assert self.layer is not None
        self.note_attention()
        self.take_buffers(keys, values)  # so that no slice of them is held
        past = attend_past(queries, self.layer, scale)
        self.queries.add(queries, keys.shape[1], self.suffix.offset - queries.shape[2], scale, past.logsumexp)
        own = backend().attend_dense(queries, keys, values, scale, mask)
        return finish(merge([own, past]), sinks, queries.dtype)


def _check_filled(caches: Sequence[Any], tokens: int) -> None:
    for index, cache in enumerate(caches):
        if isinstance(cache, KVCache) and (cache.empty() or cache.offset != tokens or cache.keys.shape[0] != 1):
            raise ValueError(f"layer {index} does not hold {tokens} tokens of one row")


def _encode(
    caches: Sequence[Any], codec: CacheCodec, compressible: Sequence[bool], parent: Prefix | None
) -> tuple[Any, ...]:
    """Compress caches layer by layer, and release each, so that the memory never holds all tokens twice."""
    layers: list[Any] = []
    for index, cache in enumerate(caches):
        layer_codec = codec.for_layer(index, len(caches))
        if isinstance(cache, SegmentCache):
            assert parent is not None
            keys, values = cache.suffix.keys_and_values()
            queries = cache.queries.statistics()
            layers.append(encode_layer(keys[0], values[0], layer_codec, queries, parent.layers[index]))
            cache.suffix = KVCache()
        elif not isinstance(cache, KVCache):
            layers.append(cache)
        elif parent is not None:
            layers.append(concatenate_caches([cache], parent.tokens))
        elif compressible[index]:
            keys, values = cache.keys_and_values()
            queries = cache.queries.statistics() if isinstance(cache, PrefillCache) else None
            layers.append(encode_layer(keys[0], values[0], layer_codec, queries))
            release(cache)
        else:
            layers.append(concatenate_caches([cache]))
    # Another thread will store the layers, and MLX evaluates an array only in the thread that asked for it.
    mx.eval([layer.tensors() if isinstance(layer, EncodedLayer) else layer.state for layer in layers])
    return tuple(layers)


# ---- segments as a prefix, and prefixes as they are attended


def join(segments: Sequence[Segment]) -> Prefix:
    """Return the prefix that a chain of segments forms.

    Raises ValueError where a segment does not follow the last, or has another codec.
    """
    stop = 0
    for segment in segments:
        if segment.start != stop or len(segment.layers) != len(segments[0].layers):
            raise ValueError(f"a segment behind {segment.start} tokens cannot follow one that ends at {stop}")
        stop = segment.stop
    if len(segments) == 1:
        return Prefix(segments[0].layers, stop)
    layers: list[Any] = []
    for entries in zip(*(segment.layers for segment in segments), strict=True):
        if len({type(entry) for entry in entries}) > 1:
            raise ValueError("the segments' layers are of different kinds")
        if isinstance(entries[0], EncodedLayer):
            layers.append(EncodedLayer.join(entries))
        else:
            layers.append(concatenate_caches(entries) if type(entries[0]) is KVCache else entries[-1])
    return Prefix(tuple(layers), stop)


def concatenate_caches(caches: Sequence[KVCache], start: int = 0) -> KVCache:
    """Return a cache of all tokens of plain caches from ``start`` on, without the unused end of their buffers."""
    keys, values = (
        mx.contiguous(mx.concatenate(list(parts), axis=2)[:, :, start:])
        for parts in zip(*(cache.keys_and_values() for cache in caches), strict=True)
    )
    return kv_cache(keys, values)


def make_resident(prefixes: Sequence[Prefix], residency: str = "auto") -> list[Prefix]:
    """Return prefixes in the form in which they are attended together.

    residency: ``packed`` leaves them compressed, so that they are decoded at every step; ``dense`` decodes them once;
        ``auto`` is packed where a kernel attends the codes, or where not all of them fit in the memory for decoded
        prefixes, and dense elsewhere.

    The choice depends only on the prefixes and the machine, not on the memory that happens to be free, since the two
    forms round differently.
    """
    encoded = [layer for prefix in prefixes for layer in prefix.layers if isinstance(layer, EncodedLayer)]
    if residency == "dense" or (residency == "auto" and not has_kernel(encoded) and dense_fits(prefixes)):
        return [prefix.dense(_dense_dtype()) for prefix in prefixes]
    return list(prefixes)


def dense_fits(prefixes: Sequence[Prefix]) -> bool:
    """Whether the memory for decoded prefixes is enough for all of these."""
    if on_cpu():
        limit = DENSE_BYTES
    else:
        info = mx.device_info()
        # Metal and CUDA name the memory differently.
        limit = int(info.get("memory_size", info.get("total_memory", 0))) // DENSE_SHARE
    return sum(prefix.dense_elements for prefix in prefixes) * _dense_dtype().size <= limit


def _dense_dtype() -> mx.Dtype:
    return mx.float32 if on_cpu() else mx.float16
