"""Caches that compress their own past while they grow, for prefill and generation in bounded memory.

TurboQuantKVCache       one layer of one row's cache
BatchTurboQuantKVCache  one layer of several rows, made by ``merge`` as mlx-lm's BatchGenerator does
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from turboquant.caches.fork import BatchForks, Fork, Mask
from turboquant.kernels.encoding import encode_layer, require_finite
from turboquant.mlx_lm.internals import BatchKVCache, KVCache, drop_oldest, widen
from turboquant.quant.cache_codec import CacheCodec, dump_codec, parse_codec
from turboquant.quant.codec import Codec, Encoded
from turboquant.quant.layer import DenseLayer, EncodedLayer

BLOCK = 128  # tokens encoded together, so that the codes don't depend on how many tokens are added at once
TILE = 4 * BLOCK  # where more tokens are encoded, the encoder's temporary arrays are held for this many at a time


class TurboQuantKVCache(Fork):
    """A cache for mlx-lm that compresses its own past.

    The last ``codec.window`` tokens stay in full precision. Older tokens are encoded ``BLOCK`` at a time, just before
    new tokens are added, about means that are fixed with the first block. So the codes of a token depend neither on how
    many tokens were added at once nor on the other rows of a batch. Tokens that are added in one call stay in full
    precision until the next call. ``codec.extra_bits`` and ``codec.query_aware`` have no effect.

    >>> cache = TurboQuantKVCache(CacheCodec(key_bits=4, value_bits=4))
    >>> keys, values = cache.update_and_fetch(mx.zeros((1, 2, 10, 64)), mx.zeros((1, 2, 10, 64)))
    >>> cache.offset
    10
    """

    def __init__(self, codec: CacheCodec | None = None) -> None:
        super().__init__(None)
        self.codec = codec or CacheCodec()
        if self.codec.coding != "scalar":
            raise ValueError("this cache has scalar codes; trellis codes are for contexts that are encoded as a whole")
        if self.codec.is_uncompressed:
            raise ValueError("this cache has 2 to 8 bits; for 16 bits, use mlx-lm's KVCache, as make_prompt_cache does")

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Compress old tokens, append (1, n_kv_heads, L, head_dim), and return what is not compressed."""
        if keys.shape[0] != 1:
            raise ValueError("TurboQuantKVCache holds one row; make a batch of rows with merge")
        self._compress()
        widen(self.suffix, keys.dtype)  # which is 16-bit floats where ``trim`` left only sinks
        return super().update_and_fetch(keys, values)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """Return a mask over the tokens that are not compressed yet when ``length`` tokens are added."""
        self._compress()
        return super().make_mask(length, return_array=return_array, window_size=window_size)

    @property
    def nbytes(self) -> int:
        """The bytes in use, of the encoded past and of the suffix's tokens."""
        past = self.layer.nbytes if self.layer is not None else 0
        if self.suffix.empty():
            return past
        keys, values = self.suffix.keys_and_values()
        return past + int(keys.nbytes + values.nbytes)

    @property
    def numbers(self) -> int:
        """How many numbers the keys and values of all its tokens have."""
        if self._encoded is not None:
            return self.offset * int(self._encoded.key_mean.size + self._encoded.value_mean.size)
        return 0 if self.suffix.empty() else sum(x.size for x in self.suffix.keys_and_values())

    @property
    def full_precision_nbytes(self) -> int:
        """The bytes of all its tokens in the dtype of the suffix, or in 16 bits a number where the suffix is empty."""
        return self.numbers * (2 if self.suffix.empty() else int(self.suffix.keys.dtype.size))

    @property
    def state(self) -> Any:
        """All that the cache holds: its codec as JSON, the tensors of its encoded past by name, its suffix's state."""
        past = self._encoded.tensors() if self._encoded is not None else None
        return dump_codec(self.codec), past, None if self.suffix.empty() else self.suffix.state

    @state.setter
    def state(self, state: Any) -> None:
        codec, past, suffix = state
        TurboQuantKVCache.__init__(self, parse_codec(json.loads(codec)))
        if past is not None:
            self.layer = EncodedLayer.from_tensors(past, replace(self.codec, window=0))
        if suffix is not None:
            self.suffix.state = suffix

    @classmethod
    def from_state(cls, state: Any) -> TurboQuantKVCache:
        """Return a cache that continues like the one that ``state`` was read from."""
        cache = cls()
        cache.state = state
        return cache

    def trim(self, n: int) -> int:
        """Drop the last n tokens, also encoded ones and sinks, and return how many were dropped."""
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
        else:  # No encoded token is left, so the means are dropped too: the cache never grew beyond its sinks.
            dtype = layer.sink_keys.dtype if self.suffix.empty() else self.suffix.keys.dtype
            self.layer, self.suffix = None, KVCache()
            if keep:
                keys, values = layer.sink_keys[None, :, :keep], layer.sink_values[None, :, :keep]
                self.suffix.update_and_fetch(keys.astype(dtype), values.astype(dtype))
        return trimmed + layer.tokens - keep

    @classmethod
    def merge(cls, caches: Sequence[Fork]) -> BatchTurboQuantKVCache:
        """Return a batch whose rows continue to compress themselves. Raises TypeError for other caches."""
        rows = [cache for cache in caches if isinstance(cache, TurboQuantKVCache)]
        if len(rows) != len(caches):
            raise TypeError("only TurboQuantKVCaches can share a batch with TurboQuantKVCaches")
        return BatchTurboQuantKVCache(rows)

    def _compress(self) -> None:
        stop = _count_due(int(self.suffix.offset), self._encoded, self.codec)
        if not stop:
            return
        keys, values = self.suffix.keys_and_values()
        self.layer = _append(self._encoded, keys[0, :, :stop], values[0, :, :stop], self.codec)
        rest = KVCache()
        if stop < self.suffix.offset:
            rest.update_and_fetch(keys[:, :, stop:], values[:, :, stop:])
        self.suffix = rest

    @property
    def _encoded(self) -> EncodedLayer | None:
        assert not isinstance(self.layer, DenseLayer)
        return self.layer


class BatchTurboQuantKVCache(BatchForks):
    """One layer of a batch: each row's past continues to be compressed, to the same codes as alone.

    One array holds all suffixes; each row's tokens lie between its ``_starts`` and ``_ends``. Once a row's tokens are
    encoded, they are dropped from that array by making them padding on the left. mlx-lm's arrays also hold where rows
    start and end, but reading those would wait for the device at every token.
    """

    def __init__(self, rows: Sequence[TurboQuantKVCache]) -> None:
        held = [row.suffix for row in rows if not row.suffix.empty()]
        for suffix in held:  # a batch has one dtype; rows of which ``trim`` left only sinks have 16-bit floats
            widen(suffix, max((x.keys.dtype for x in held), key=lambda dtype: dtype.size))
        super().__init__([row.layer for row in rows], BatchKVCache.merge([row.suffix for row in rows]))
        self.codecs = [row.codec for row in rows]
        self._starts = [int(self.suffix.size() - row.suffix.offset) for row in rows]
        self._ends: list[int] | None = None  # not None while there is padding on the right
        self._right_padding: list[int] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Compress old tokens of each row, append (B, n_kv_heads, L, head_dim), and return the suffixes."""
        self._compress()
        widen(self.suffix, keys.dtype)  # which is 16-bit floats where ``trim`` left only sinks
        return super().update_and_fetch(keys, values)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return a mask (B, 1, L, T) over the tokens that are not compressed yet when ``length`` tokens are added."""
        self._compress()
        return super().make_mask(length, return_array=return_array, window_size=window_size)

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        """Announce the padding of the tokens to come, as mlx-lm's BatchKVCache does."""
        super().prepare(left_padding=left_padding, lengths=lengths, right_padding=right_padding)
        if left_padding is not None:
            self._starts = [start + n for start, n in zip(self._starts, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = list(right_padding)
            held = self.suffix.size()
            self._ends = [held + n for n in lengths or [0] * len(self.layers)]

    def finalize(self) -> None:
        """Move padding from the right to the left, as mlx-lm's BatchKVCache does."""
        super().finalize()
        if self._ends is not None:
            self._starts = [start + n for start, n in zip(self._starts, self._right_padding, strict=True)]
            self._ends = None

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep only the rows given."""
        held = self.suffix.size()
        super().filter(batch_indices)
        moved = held - self.suffix.size()  # mlx-lm's cache cuts off what is padding in all rows
        self.codecs = [self.codecs[row] for row in batch_indices]
        self._starts = [self._starts[row] - moved for row in batch_indices]

    def extend(self, other: BatchForks) -> None:
        """Add the rows of another batch behind these. Raises TypeError where they don't compress themselves."""
        if not isinstance(other, BatchTurboQuantKVCache):
            raise TypeError("only TurboQuantKVCaches can share a batch with TurboQuantKVCaches")
        held, others = self.suffix.size(), other.suffix.size()
        super().extend(other)
        self.codecs = self.codecs + other.codecs
        longest = self.suffix.size()
        self._starts = [
            *(start + longest - held for start in self._starts),
            *(start + longest - others for start in other._starts),
        ]

    def extract(self, row: int) -> TurboQuantKVCache:
        """Return one row with its past and its codec."""
        cache = TurboQuantKVCache(self.codecs[row])
        cache.layer = self.layers[row]
        if self.suffix.size() > self._starts[row]:
            cache.suffix = self.suffix.extract(row)
        return cache

    def trim(self, n: int) -> int:
        """Drop the last n tokens of every row, also encoded ones, and return how many were dropped."""
        rows = [self.extract(row) for row in range(len(self.layers))]
        trimmed = max(row.trim(n) for row in rows)
        BatchTurboQuantKVCache.__init__(self, rows)
        return trimmed

    @property
    def state(self) -> Any:
        """All arrays, with those of the encoded pasts, for evaluation."""
        pasts = [layer.tensors() for layer in self.layers if isinstance(layer, EncodedLayer)]
        return [pasts, super().state]

    @property
    def nbytes(self) -> int:
        """The bytes in use, of the encoded pasts and of the suffixes with their padding."""
        suffixes = () if self.suffix.empty() else self.suffix.keys_and_values()
        pasts = [layer for layer in self.layers if layer is not None]
        return sum(int(x.nbytes) for x in (*suffixes, *pasts))

    def _compress(self) -> None:
        stops = self._ends or [self.suffix.size()] * len(self.layers)
        drop, layers = [0] * len(self.layers), list(self.layers)
        for row, (start, stop, codec) in enumerate(zip(self._starts, stops, self.codecs, strict=True)):
            layer = layers[row]
            assert not isinstance(layer, DenseLayer)
            drop[row] = _count_due(min(stop, self.suffix.size()) - start, layer, codec)
            if drop[row]:
                keys, values = (x[row, :, start : start + drop[row]] for x in (self.suffix.keys, self.suffix.values))
                layers[row] = _append(layer, keys, values, codec)
        if not any(drop):
            return
        self.set_layers(layers)
        starts = [start + n for start, n in zip(self._starts, drop, strict=True)]
        unused = min(starts)
        drop_oldest(self.suffix, drop, unused)
        self._starts = [start - unused for start in starts]
        if self._ends is not None:
            self._ends = [end - unused for end in self._ends]


# ---- a past that grows


def _count_due(tokens: int, layer: EncodedLayer | None, codec: CacheCodec) -> int:
    """Return how many of the oldest ``tokens`` behind a past must be encoded now: whole blocks, and sinks first."""
    sinks = codec.sinks if layer is None else 0
    blocks = (tokens - sinks - codec.window) // BLOCK
    return sinks + blocks * BLOCK if blocks > 0 else 0


def _append(layer: EncodedLayer | None, keys: mx.array, values: mx.array, codec: CacheCodec) -> EncodedLayer:
    """Return a past with keys and values (n_kv_heads, n, head_dim) behind it.

    This copies the past once; attention reads it at every step. Raises ValueError if keys or values are not finite.
    """
    require_finite(keys, values)
    if layer is None:
        first = codec.sinks + BLOCK
        # The first part has no window of its own: the suffix is the window.
        layer = encode_layer(keys[:, :first], values[:, :first], replace(codec, window=0))
        keys, values = keys[:, first:], values[:, first:]
    return replace(
        layer,
        keys=_append_vectors(layer.keys, keys, layer.key_codec, layer.key_mean),
        values=_append_vectors(layer.values, values, layer.value_codec, layer.value_mean),
    )


def _append_vectors(encoded: Encoded, x: mx.array, codec: Codec, mean: mx.array) -> Encoded:
    parts = [encoded]
    for start in range(0, x.shape[1], TILE):
        parts.append(codec.encode(x[:, start : start + TILE], mean))
        mx.eval(parts[-1].codes, parts[-1].scales)
    if len(parts) == 1:
        return encoded
    whole = Encoded.concatenate(parts)
    mx.eval(whole.codes, whole.scales)
    return whole
