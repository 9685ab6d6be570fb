"""mlx-lm caches over compressed K/V.

    Prefix            a whole context, compressed and immutable; forked once for each query
    Fork              one layer of a fork: the shared encoded layer and a full-precision suffix of its own
    BatchForks        one layer of several forks in a batch, as mlx-lm's BatchGenerator makes it by ``merge``
    TurboQuantKVCache a cache that compresses its own past as it grows, in fixed blocks
    PrefillCache      full precision, for building a prefix

They know mlx-lm's cache contract and nothing of prompts or files. The model must be made to call ``attend``
(dispatch.py); ``update_and_fetch`` hands back the suffix only. None has an attribute ``bits``: mlx-lm would take it
for its own quantised cache.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from turboquant.attention import Partial, add_sink_logits, merge
from turboquant.codec import CacheCodec, Encoded
from turboquant.kernels import attend_past, backend, on_cpu
from turboquant.layer import DenseLayer, EncodedLayer

Mask = mx.array | str | None


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
                layers.append(EncodedLayer.encode(keys[0], values[0], codec))
                cache.keys = cache.values = None
            else:
                layers.append(_trimmed(cache) if plain else cache)
        return cls(tuple(layers), tokens)

    def fork(self) -> list[Any]:
        """A prompt cache for one query: O(1) a layer for encoded layers, whatever the context's length."""
        return [Fork(x) if isinstance(x, EncodedLayer | DenseLayer) else copy.deepcopy(x) for x in self.layers]

    def dense(self, dtype: mx.Dtype) -> Prefix:
        """The same prefix with its encoded layers decoded once: faster to attend, several times larger."""
        layers = [x.dense(dtype) if isinstance(x, EncodedLayer) else x for x in self.layers]
        return Prefix(tuple(layers), self.tokens)

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


class PrefillCache(KVCache):  # type: ignore[misc]
    """A full-precision cache for a context of known length, attending on a CPU through ``kernels/cpu.py``."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.step = max(1, capacity)  # allocate once

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
        if not on_cpu():
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        return _finish(backend().attend_dense(queries, keys, values, scale, mask), sinks, queries.dtype)


class Fork:
    """One layer of one query's cache: encoded past, shared and immutable, and a full-precision suffix.

    ``layer`` is None while nothing is compressed (in a ``TurboQuantKVCache`` that is still short).
    """

    def __init__(self, layer: EncodedLayer | DenseLayer | None) -> None:
        self.layer = layer
        self.suffix = KVCache()

    @property
    def offset(self) -> int:
        """Tokens before the next one: its position."""
        return self._past + int(self.suffix.offset)

    @property
    def _past(self) -> int:
        return self.layer.tokens if self.layer is not None else 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (1, n_kv_heads, L, head_dim) to the suffix and return the suffix."""
        fetched: tuple[mx.array, mx.array] = self.suffix.update_and_fetch(keys, values)
        return fetched

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attention of queries (1, n_heads, L, head_dim) over the encoded past and the suffix given."""
        parts = [backend().attend_dense(queries, keys, values, scale, mask)]
        if self.layer is not None:
            parts.append(attend_past(queries, self.layer, scale))
        return _finish(merge(parts), sinks, queries.dtype)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """A mask over the suffix; every query sees the whole encoded past."""
        if window_size is not None:
            raise ValueError("a sliding-window layer cannot run on a compressed cache")
        mask: Mask = self.suffix.make_mask(length, return_array=return_array, window_size=None)
        return mask

    @property
    def state(self) -> Any:
        """The suffix's arrays; the encoded past never changes."""
        return [] if self.suffix.empty() else self.suffix.state

    @property
    def nbytes(self) -> int:
        """Bytes of the suffix: the encoded past is shared."""
        return int(self.suffix.nbytes)

    def size(self) -> int:
        """Tokens held, past and suffix."""
        return self.offset

    def empty(self) -> bool:
        """Whether nothing is held at all."""
        return self.layer is None and bool(self.suffix.empty())

    def is_trimmable(self) -> bool:
        """The suffix can be trimmed."""
        return True

    def trim(self, n: int) -> int:
        """Drop the last n tokens, of the suffix at most; returns how many."""
        return int(self.suffix.trim(n))

    def __deepcopy__(self, memo: dict[int, Any]) -> Fork:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.suffix = copy.deepcopy(self.suffix, memo)
        return copied

    @classmethod
    def merge(cls, forks: Sequence[Fork]) -> BatchForks:
        """A batch whose rows are the forks'."""
        return BatchForks([fork.layer for fork in forks], BatchKVCache.merge([fork.suffix for fork in forks]))


class BatchForks:
    """One layer of a batch: each row's encoded past, shared where rows have the same, and a batched suffix."""

    def __init__(self, layers: list[EncodedLayer | DenseLayer | None], suffix: BatchKVCache) -> None:
        self.layers = layers
        self.suffix = suffix

    @property
    def offset(self) -> mx.array:
        """(B,) the position of each row's next token."""
        past = [layer.tokens if layer is not None else 0 for layer in self.layers]
        offset: mx.array = self.suffix.offset + mx.array(past)
        return offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, n_kv_heads, L, head_dim) to the suffixes and return them."""
        fetched: tuple[mx.array, mx.array] = self.suffix.update_and_fetch(keys, values)
        return fetched

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attention of queries (B, n_heads, L, head_dim): each distinct past is read once, for all its rows."""
        suffix = backend().attend_dense(queries, keys, values, scale, mask)
        return _finish(merge([suffix, self._attend_past(queries, scale)]), sinks, queries.dtype)

    def _attend_past(self, queries: mx.array, scale: float) -> Partial:
        groups = self._rows_by_layer()
        if len(groups) == 1 and self.layers[0] is not None:
            return attend_past(queries, self.layers[0], scale)
        parts, order = [], []
        for rows in groups:
            layer, some = self.layers[rows[0]], queries[mx.array(rows)]
            parts.append(_nothing(some) if layer is None else attend_past(some, layer, scale))
            order += rows
        back = mx.array(sorted(range(len(order)), key=order.__getitem__))
        return Partial(
            mx.concatenate([part.output for part in parts])[back],
            mx.concatenate([part.logsumexp for part in parts])[back],
        )

    def _rows_by_layer(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for row, layer in enumerate(self.layers):
            groups.setdefault(id(layer), []).append(row)
        return list(groups.values())

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """A mask (B, 1, L, T) over the suffixes; every query sees its row's whole encoded past."""
        if window_size is not None:
            raise ValueError("a sliding-window layer cannot run on a compressed cache")
        mask: mx.array = self.suffix.make_mask(length)
        return mask

    def prepare(self, **lengths: Any) -> None:
        """Announce padding; see mlx-lm's BatchKVCache."""
        self.suffix.prepare(**lengths)

    def finalize(self) -> None:
        """Move right padding to the left; see mlx-lm's BatchKVCache."""
        self.suffix.finalize()

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep only the rows given."""
        self.layers = [self.layers[row] for row in batch_indices]
        self.suffix.filter(batch_indices)

    def extend(self, other: BatchForks) -> None:
        """Add the other batch's rows behind these."""
        self.layers = self.layers + other.layers
        self.suffix.extend(other.suffix)

    def extract(self, row: int) -> Fork:
        """The row as a fork; its past stays shared."""
        fork = Fork(self.layers[row])
        if not self.suffix.empty():
            fork.suffix = self.suffix.extract(row)
        return fork

    @property
    def state(self) -> Any:
        """The suffixes' arrays."""
        return [] if self.suffix.empty() else self.suffix.state

    @property
    def nbytes(self) -> int:
        """Bytes of the suffixes."""
        return int(self.suffix.nbytes)

    def size(self) -> int:
        """The longest row's tokens in the suffix."""
        return int(self.suffix.size())

    def empty(self) -> bool:
        """Whether no suffix holds anything."""
        return bool(self.suffix.empty())

    def is_trimmable(self) -> bool:
        """The suffixes can be trimmed."""
        return True

    def trim(self, n: int) -> int:
        """Drop the last n tokens of every suffix; returns how many."""
        return int(self.suffix.trim(n))

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchForks:
        return BatchForks(list(self.layers), copy.deepcopy(self.suffix, memo))


class TurboQuantKVCache(Fork):
    """An ordinary mlx-lm cache that compresses its own past.

    The last ``codec.window`` tokens stay in full precision; what is older is encoded ``BLOCK`` tokens at a time,
    about means frozen with the first block, before new tokens are added. So the codes of a token don't depend on
    how many tokens were added at once.

    >>> cache = TurboQuantKVCache(CacheCodec(key_bits=4, value_bits=4))
    >>> keys, values = cache.update_and_fetch(mx.zeros((1, 2, 10, 64)), mx.zeros((1, 2, 10, 64)))
    >>> cache.offset
    10
    """

    BLOCK = 128

    def __init__(self, codec: CacheCodec | None = None) -> None:
        super().__init__(None)
        self.codec = codec or CacheCodec()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Compress what has grown old, append (1, n_kv_heads, L, head_dim), return what is not compressed."""
        self._compress()
        return super().update_and_fetch(keys, values)

    @property
    def nbytes(self) -> int:
        """Bytes in use: of the encoded past and of the suffix's tokens."""
        if self.suffix.empty():
            return 0
        keys, values = self.suffix.keys_and_values()
        return int(keys.nbytes + values.nbytes) + (self.layer.nbytes if self.layer is not None else 0)

    @property
    def state(self) -> Any:
        """All arrays, those of the encoded past included, for evaluation."""
        past = list(self._encoded.tensors().values()) if self._encoded is not None else []
        return [past, super().state]

    def trim(self, n: int) -> int:
        """Drop the last n tokens, encoded ones and sinks too where n reaches them; returns how many."""
        trimmed = int(self.suffix.trim(n))
        layer = self._encoded
        if layer is None or trimmed == n:
            return trimmed
        keep = max(0, layer.tokens - (n - trimmed))
        sinks = layer.sink_keys.shape[1]
        if keep > sinks:
            self.layer = replace(
                layer,
                keys=layer.keys.slice_tokens(0, keep - sinks),
                values=layer.values.slice_tokens(0, keep - sinks),
            )
        else:  # nothing encoded is left, nor a use for its means: as if the cache had never grown beyond its sinks
            dtype = layer.sink_keys.dtype if self.suffix.empty() else self.suffix.keys.dtype
            self.layer, self.suffix = None, KVCache()
            if keep:
                keys, values = layer.sink_keys[None, :, :keep], layer.sink_values[None, :, :keep]
                self.suffix.update_and_fetch(keys.astype(dtype), values.astype(dtype))
        return trimmed + layer.tokens - keep

    def _compress(self) -> None:
        if self.suffix.empty():
            return
        first = self.codec.sinks if self.layer is None else 0
        blocks = (self.suffix.offset - first - self.codec.window) // self.BLOCK
        if blocks < 1:
            return
        keys, values = self.suffix.keys_and_values()
        if keys.shape[0] != 1:
            raise ValueError("TurboQuantKVCache holds one row; make a batch of rows with merge")
        for start in range(first, first + blocks * self.BLOCK, self.BLOCK):
            stop = start + self.BLOCK
            layer = self._encoded
            if layer is None:
                # No window is due in this first part: the suffix is the window.
                codec = replace(self.codec, window=0)
                self.layer = EncodedLayer.encode(keys[0, :, :stop], values[0, :, :stop], codec)
            else:
                new_keys = layer.key_codec.encode(keys[0, :, start:stop], layer.key_mean)
                new_values = layer.value_codec.encode(values[0, :, start:stop], layer.value_mean)
                self.layer = replace(
                    layer,
                    keys=Encoded.concatenate([layer.keys, new_keys]),
                    values=Encoded.concatenate([layer.values, new_values]),
                )
        rest = KVCache()
        if stop < self.suffix.offset:
            rest.update_and_fetch(keys[:, :, stop:], values[:, :, stop:])
        self.suffix = rest

    @property
    def _encoded(self) -> EncodedLayer | None:
        assert not isinstance(self.layer, DenseLayer)
        return self.layer


def _trimmed(cache: KVCache) -> KVCache:
    """A plain cache without the unused end of its buffers."""
    keys, values = cache.keys_and_values()
    trimmed = KVCache()
    trimmed.state = (mx.contiguous(keys), mx.contiguous(values), cache.offset)
    return trimmed


def _finish(part: Partial, sinks: mx.array | None, dtype: mx.Dtype) -> mx.array:
    if sinks is not None:
        part = add_sink_logits(part, sinks[None, :, None])
    return part.output.astype(dtype)


def _nothing(queries: mx.array) -> Partial:
    """Attention over no tokens at all."""
    return Partial(mx.zeros(queries.shape), mx.full(queries.shape[:-1], -mx.inf))
