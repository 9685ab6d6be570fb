"""A context in segments: each prefilled behind the compressed ones before it, and of use behind them again.

    Segment          the compressed K/V of a run of tokens, those of its parent not included
    prefill_segment  builds one; the model attends to the segment in full precision, to its parent compressed
    join             a chain of segments as one prefix

So what is long and common to many contexts is prefilled once, and a context that grows goes on from what it was. The
codes of a segment depend on its tokens and its parent's alone, never on when either was built. Knows tokens and
layers, not what they say or where a segment is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from turboquant.attention.dispatch import attend_past, backend
from turboquant.attention.reference import finish, merge
from turboquant.caches.fork import Fork, Mask
from turboquant.caches.prefix import Prefix, dense_fits, feed, plain_cache, prefill_caches, resident
from turboquant.kernels.encoding import encode_layer
from turboquant.mlx_lm.patch import compressible_layers, enabled
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.layer import DenseLayer, EncodedLayer
from turboquant.quant.query_stats import QueryCollector


@dataclass(frozen=True)
class Segment:
    """The compressed K/V of ``tokens`` tokens behind ``start`` others, one entry a layer of the model.

    An entry is an ``EncodedLayer`` or a plain ``KVCache`` of the segment's own tokens, or another cache of mlx-lm's
    as it was after the last of them.
    """

    layers: tuple[Any, ...]
    start: int
    tokens: int

    @property
    def stop(self) -> int:
        """Tokens up to its end, its parent's included."""
        return self.start + self.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(int(layer.nbytes) for layer in self.layers)


class SegmentCache(Fork):
    """One layer's full-precision cache of a segment being prefilled, behind its compressed parent.

    queries: gathers those of the segment, for its encoding.
    """

    def __init__(self, parent: EncodedLayer | DenseLayer, capacity: int) -> None:
        super().__init__(parent)
        self.suffix.step = max(1, capacity)  # allocate once
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
        """Attention of the chunk just added over the parent and all that is cached behind it."""
        assert self.layer is not None
        self._attention_called()
        past = attend_past(queries, self.layer, scale)
        self.queries.add(queries, keys.shape[1], self.suffix.offset - queries.shape[2], scale, past.logsumexp)
        own = backend().attend_dense(queries, keys, values, scale, mask)
        return finish(merge([own, past]), sinks, queries.dtype)


def prefill_segment(
    model: Any,
    tokens: Sequence[int],
    codec: CacheCodec,
    parent: Prefix | None = None,
    chunk: int = 512,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Segment:
    """Build the segment of ``tokens`` that stand behind ``parent``, ``chunk`` tokens a step.

    on_progress: called with the tokens of each chunk done; what it raises ends the prefill.
    """
    compressible, count = compressible_layers(model), len(tokens)
    start = parent.tokens if parent is not None else 0
    caches: list[Any]
    if parent is None:
        caches = prefill_caches(model, count, compressible)
    else:
        caches = [
            SegmentCache(layer, count) if isinstance(layer, EncodedLayer | DenseLayer) else copy.deepcopy(layer)
            for layer in resident([parent], "dense" if dense_fits([parent]) else "packed")[0].layers
        ]
    with enabled(model):
        feed(model, caches, tokens, chunk, on_progress)
    if parent is None:
        return Segment(Prefix.encode(caches, count, codec, compressible).layers, 0, count)
    layers: list[Any] = []
    for index, (cache, before) in enumerate(zip(caches, parent.layers, strict=True)):
        if isinstance(cache, SegmentCache):
            keys, values = cache.suffix.keys_and_values()
            own = codec.for_layer(index, len(caches))
            layers.append(encode_layer(keys[0], values[0], own, cache.queries.statistics(), before))
            cache.suffix = KVCache()  # so that memory never holds the whole segment twice
        else:
            layers.append(plain_cache([cache], start) if type(cache) is KVCache else cache)
    mx.eval([layer.tensors() for layer in layers if isinstance(layer, EncodedLayer)])
    return Segment(tuple(layers), start, count)


def join(segments: Sequence[Segment]) -> Prefix:
    """The prefix that a chain of segments is. Raises ValueError where one does not follow the one before it."""
    stop = 0
    for segment in segments:
        if segment.start != stop or len(segment.layers) != len(segments[0].layers):
            raise ValueError(f"a segment behind {segment.start} tokens cannot follow one that ends at {stop}")
        stop = segment.stop
    if len(segments) == 1:
        return Prefix(segments[0].layers, stop)
    layers = [_join(entries) for entries in zip(*(segment.layers for segment in segments), strict=True)]
    return Prefix(tuple(layers), stop)


def _join(entries: tuple[Any, ...]) -> Any:
    """One layer's entries of all segments as one."""
    if len({type(entry) for entry in entries}) > 1:
        raise ValueError("the segments' layers are of different kinds")
    if isinstance(entries[0], EncodedLayer):
        return EncodedLayer.join(entries)
    return plain_cache(entries) if type(entries[0]) is KVCache else entries[-1]
