"""A context compressed once, when it is finished, and shared by all its queries.

    Prefix        the compressed K/V of a context, immutable; forked once for each query
    PrefillCache  full precision, for building a prefix
    prefill       tokens through a model into a prefix; feed, into caches of any kind

Every chunk of an ``exact`` prefill attends to its past in full precision, and the finished context is encoded at
once. Knows mlx-lm's caches and tokens, not what they say or where a prefix is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from turboquant.attention.dispatch import backend, has_kernel, implementation
from turboquant.attention.reference import finish
from turboquant.caches.fork import Fork, Mask
from turboquant.kernels.encoding import encode_layer
from turboquant.mlx_lm.patch import compressible_layers, enabled
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.layer import DenseLayer, EncodedLayer
from turboquant.quant.query_stats import QueryCollector
from turboquant.runtime.device import on_cpu

DENSE_BYTES = 2 << 30  # of prefixes decoded once, on a CPU
DENSE_SHARE = 8  # elsewhere: one part in so many of the device's memory


@dataclass(frozen=True)
class Prefix:
    """The compressed K/V of a context, one entry a layer of the model.

    An entry is an ``EncodedLayer``, or a cache of mlx-lm's kept as it is (sliding-window, recurrent and other layers
    that are not compressed); those are copied for each fork, encoded layers are shared.
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
        """Compress a prompt cache filled with ``tokens`` tokens of one row (B = 1).

        compressible: which layers to compress, all plain KV layers if None; see ``dispatch.compressible_layers``.
        Where the cache is a ``PrefillCache`` that attended, its queries help to encode it.
        Compressed layers are emptied one by one, so that memory never holds the whole context twice. Raises
        ValueError where a layer to be compressed does not hold that many tokens of one row.
        """
        layers: list[Any] = []
        for index, cache in enumerate(prompt_cache):
            plain = isinstance(cache, KVCache)
            if plain and (cache.empty() or cache.offset != tokens or cache.keys.shape[0] != 1):
                raise ValueError(f"layer {index} does not hold {tokens} tokens of one row")
            if plain and (compressible is None or compressible[index]):
                keys, values = cache.keys_and_values()
                queries = cache.queries.statistics() if isinstance(cache, PrefillCache) else None
                own = codec.for_layer(index, len(prompt_cache))
                layers.append(encode_layer(keys[0], values[0], own, queries))
                cache.keys = cache.values = None
            else:
                layers.append(plain_cache([cache]) if plain else cache)
        mx.eval([layer.tensors() for layer in layers if isinstance(layer, EncodedLayer)])
        return cls(tuple(layers), tokens)

    def fork(self) -> list[Any]:
        """A prompt cache for one query: O(1) a layer for encoded layers, whatever the context's length."""
        return [Fork(x) if isinstance(x, EncodedLayer | DenseLayer) else copy.deepcopy(x) for x in self.layers]

    def dense(self, dtype: mx.Dtype) -> Prefix:
        """The same prefix with its encoded layers decoded once: faster to attend, several times larger."""
        layers = [x.dense(dtype) if isinstance(x, EncodedLayer) else x for x in self.layers]
        return Prefix(tuple(layers), self.tokens)

    @property
    def is_dense(self) -> bool:
        """Whether layers are decoded."""
        return any(isinstance(layer, DenseLayer) for layer in self.layers)

    @property
    def attended_by(self) -> str:
        """What attends its compressed layers, see ``kernels.implementation``."""
        return implementation(layer for layer in self.layers if isinstance(layer, EncodedLayer | DenseLayer))

    @property
    def dense_elements(self) -> int:
        """How many numbers ``dense`` holds in the layers it decodes."""
        encoded = [layer for layer in self.layers if isinstance(layer, EncodedLayer)]
        per_token = sum(x.key_mean.size + x.value_mean.size for x in encoded)
        return self.tokens * per_token

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(int(layer.nbytes) for layer in self.layers)

    @property
    def effective_bits(self) -> float:
        """Mean bits a coordinate over the encoded layers, everything counted."""
        encoded = [layer for layer in self.layers if isinstance(layer, EncodedLayer)]
        return sum(layer.effective_bits for layer in encoded) / max(1, len(encoded))


def resident(prefixes: Sequence[Prefix], how: str = "auto") -> list[Prefix]:
    """Prefixes as they are attended together: ``packed``, decoded anew at every step, or ``dense``, decoded once.

    ``auto`` is packed where a kernel attends codes; where looking up levels takes most of a step, it is dense while all
    of them fit in ``DENSE_BYTES``, or a part of a GPU's memory. The choice depends on the prefixes and the machine
    alone, not on what memory happens to be free: rounding differs between the two.
    """
    encoded = [layer for prefix in prefixes for layer in prefix.layers if isinstance(layer, EncodedLayer)]
    if how == "dense" or (how == "auto" and not has_kernel(encoded) and dense_fits(prefixes)):
        return [prefix.dense(_dense_dtype()) for prefix in prefixes]
    return list(prefixes)


def dense_fits(prefixes: Sequence[Prefix]) -> bool:
    """Whether the memory set apart for prefixes decoded once is enough for all of these."""
    if on_cpu():
        most = DENSE_BYTES
    else:
        info = mx.device_info()
        most = int(info.get("memory_size", info.get("total_memory", 0))) // DENSE_SHARE  # Metal's name, and CUDA's
    return sum(prefix.dense_elements for prefix in prefixes) * _dense_dtype().size <= most


def _dense_dtype() -> mx.Dtype:
    return mx.float32 if on_cpu() else mx.float16


class PrefillCache(KVCache):  # type: ignore[misc]
    """A full-precision cache for a context of known length, attending on a CPU through ``attention/cpu.py``.

    queries: gathers those of the context, for its encoding.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.step = max(1, capacity)  # allocate once
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
        """Causal attention of the chunk just added over all that is cached."""
        self.queries.add(queries, keys.shape[1], self.offset - queries.shape[2], scale)
        if not on_cpu():
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        return finish(backend().attend_dense(queries, keys, values, scale, mask), sinks, queries.dtype)


def prefill(
    model: Any,
    tokens: Sequence[int],
    codec: CacheCodec,
    chunk: int = 512,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Prefix:
    """Build the prefix of a context, ``chunk`` tokens a step.

    on_progress: called with the tokens of each chunk done; what it raises ends the prefill.
    """
    compressible = compressible_layers(model)
    caches = prefill_caches(model, len(tokens), compressible)
    with enabled(model):
        feed(model, caches, tokens, chunk, on_progress)
    return Prefix.encode(caches, len(tokens), codec, compressible)


def prefill_caches(model: Any, tokens: int, compressible: Sequence[bool]) -> list[Any]:
    """Empty full-precision caches for a context of ``tokens`` tokens: ``PrefillCache`` where it will be encoded."""
    stock = make_prompt_cache(model)
    return [PrefillCache(tokens) if yes else cache for yes, cache in zip(compressible, stock, strict=True)]


def feed(
    model: Any,
    caches: Sequence[Any],
    tokens: Sequence[int],
    chunk: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Run a context through a model into caches, ``chunk`` tokens a step; see ``prefill`` for ``on_progress``."""
    for start in range(0, len(tokens), chunk):
        some = tokens[start : start + chunk]
        model(mx.array(list(some))[None], cache=caches)
        mx.eval([cache.state for cache in caches])  # the logits are never needed, so never computed
        mx.clear_cache()
        on_progress(len(some))


def plain_cache(caches: Sequence[KVCache], start: int = 0) -> KVCache:
    """The tokens of plain caches one behind the other, from ``start`` on, without the unused end of their buffers."""
    keys, values = (
        mx.contiguous(mx.concatenate(list(parts), axis=2)[:, :, start:])
        for parts in zip(*(cache.keys_and_values() for cache in caches), strict=True)
    )
    whole = KVCache()
    whole.state = (keys, values, keys.shape[2])
    return whole
