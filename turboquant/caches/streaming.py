"""Caches that compress their own past as they grow, for prefill and generation in bounded memory.

    TurboQuantKVCache       one layer of one row's cache
    BatchTurboQuantKVCache  one layer of several rows, as mlx-lm's BatchGenerator makes it by ``merge``

Know mlx-lm's cache contract and the codec; a past that is compressed once, when it is finished, is prefix.py's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from turboquant.caches.fork import BatchForks, Fork, Mask
from turboquant.caches.growth import due, grown
from turboquant.quant.cache_codec import CacheCodec, dump_codec, parse_codec
from turboquant.quant.layer import DenseLayer, EncodedLayer


class TurboQuantKVCache(Fork):
    """An ordinary mlx-lm cache that compresses its own past.

    The last ``codec.window`` tokens stay in full precision; what is older is encoded ``BLOCK`` tokens at a time,
    about means frozen with the first block, before new tokens are added. So the codes of a token don't depend on
    how many tokens were added at once, nor on the batch it was in; tokens added in one call stay in full precision
    until the next.

    >>> cache = TurboQuantKVCache(CacheCodec(key_bits=4, value_bits=4))
    >>> keys, values = cache.update_and_fetch(mx.zeros((1, 2, 10, 64)), mx.zeros((1, 2, 10, 64)))
    >>> cache.offset
    10
    """

    def __init__(self, codec: CacheCodec | None = None) -> None:
        super().__init__(None)
        self.codec = codec or CacheCodec()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Compress what has grown old, append (1, n_kv_heads, L, head_dim), return what is not compressed."""
        if keys.shape[0] != 1:
            raise ValueError("TurboQuantKVCache holds one row; make a batch of rows with merge")
        self._compress()
        return super().update_and_fetch(keys, values)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """A mask over what will not be compressed when ``length`` tokens are added."""
        self._compress()
        return super().make_mask(length, return_array=return_array, window_size=window_size)

    @property
    def nbytes(self) -> int:
        """Bytes in use: of the encoded past and of the suffix's tokens."""
        past = self.layer.nbytes if self.layer is not None else 0
        if self.suffix.empty():
            return past
        keys, values = self.suffix.keys_and_values()
        return past + int(keys.nbytes + values.nbytes)

    @property
    def numbers(self) -> int:
        """How many numbers the keys and values of all its tokens are."""
        if self._encoded is not None:
            return self.offset * int(self._encoded.key_mean.size + self._encoded.value_mean.size)
        return 0 if self.suffix.empty() else sum(x.size for x in self.suffix.keys_and_values())

    @property
    def full_precision_nbytes(self) -> int:
        """Bytes that all its tokens would take as they came; 16 bits a number where none is left as it came."""
        return self.numbers * (2 if self.suffix.empty() else int(self.suffix.keys.dtype.size))

    @property
    def state(self) -> Any:
        """Everything the cache holds: the codec as JSON, the encoded past's tensors by name, the suffix's state."""
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
        """A cache that goes on as the one whose ``state`` this was."""
        cache = cls()
        cache.state = state
        return cache

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

    @classmethod
    def merge(cls, caches: Sequence[Fork]) -> BatchTurboQuantKVCache:
        """A batch whose rows go on being compressed. Raises TypeError where a cache is of another class."""
        rows = [cache for cache in caches if isinstance(cache, TurboQuantKVCache)]
        if len(rows) != len(caches):
            raise TypeError("only TurboQuantKVCaches can share a batch with TurboQuantKVCaches")
        return BatchTurboQuantKVCache(rows)

    def _compress(self) -> None:
        stop = due(int(self.suffix.offset), self._encoded, self.codec)
        if not stop:
            return
        keys, values = self.suffix.keys_and_values()
        self.layer = grown(self._encoded, keys[0, :, :stop], values[0, :, :stop], self.codec)
        rest = KVCache()
        if stop < self.suffix.offset:
            rest.update_and_fetch(keys[:, :, stop:], values[:, :, stop:])
        self.suffix = rest

    @property
    def _encoded(self) -> EncodedLayer | None:
        assert not isinstance(self.layer, DenseLayer)
        return self.layer


class BatchTurboQuantKVCache(BatchForks):
    """One layer of a batch: each row's past goes on being compressed, to the codes that it would have alone.

    The suffixes lie in one array, each row's between its ``_starts`` and ``_ends``; a row's tokens are dropped from
    it, once encoded, by making them left padding. Both are kept here besides in mlx-lm's arrays, for reading those
    would wait for the device at every token.
    """

    def __init__(self, rows: Sequence[TurboQuantKVCache]) -> None:
        super().__init__([row.layer for row in rows], BatchKVCache.merge([row.suffix for row in rows]))
        self.codecs = [row.codec for row in rows]
        self._starts = [int(self.suffix.size() - row.suffix.offset) for row in rows]
        self._ends: list[int] | None = None  # set while padding is announced on the right
        self._right_padding: list[int] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Compress what has grown old in each row, append (B, n_kv_heads, L, head_dim), return the suffixes."""
        self._compress()
        return super().update_and_fetch(keys, values)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """A mask (B, 1, L, T) over what will not be compressed when ``length`` tokens are added."""
        self._compress()
        return super().make_mask(length, return_array=return_array, window_size=window_size)

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        """Announce padding, and how many tokens to come are none; see mlx-lm's BatchKVCache."""
        super().prepare(left_padding=left_padding, lengths=lengths, right_padding=right_padding)
        if left_padding is not None:
            self._starts = [start + n for start, n in zip(self._starts, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = list(right_padding)
            held = self.suffix.size()
            self._ends = [held + n for n in lengths or [0] * len(self.layers)]

    def finalize(self) -> None:
        """Move right padding to the left; see mlx-lm's BatchKVCache."""
        super().finalize()
        if self._ends is not None:
            self._starts = [start + n for start, n in zip(self._starts, self._right_padding, strict=True)]
            self._ends = None

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep only the rows given."""
        held = self.suffix.size()
        super().filter(batch_indices)
        moved = held - self.suffix.size()  # mlx-lm's cache drops what is padding in all rows
        self.codecs = [self.codecs[row] for row in batch_indices]
        self._starts = [self._starts[row] - moved for row in batch_indices]

    def extend(self, other: BatchForks) -> None:
        """Add the other batch's rows behind these. Raises TypeError where its rows don't compress themselves."""
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
        """The row by itself, with its past and codec."""
        cache = TurboQuantKVCache(self.codecs[row])
        cache.layer = self.layers[row]
        if self.suffix.size() > self._starts[row]:
            cache.suffix = self.suffix.extract(row)
        return cache

    def trim(self, n: int) -> int:
        """Drop the last n tokens of every row, encoded ones too where n reaches them; returns how many."""
        rows = [self.extract(row) for row in range(len(self.layers))]
        trimmed = max(row.trim(n) for row in rows)
        BatchTurboQuantKVCache.__init__(self, rows)
        return trimmed

    @property
    def state(self) -> Any:
        """All arrays, those of the encoded pasts included, for evaluation."""
        pasts = [layer.tensors() for layer in self.layers if isinstance(layer, EncodedLayer)]
        return [pasts, super().state]

    @property
    def nbytes(self) -> int:
        """Bytes in use: of the encoded pasts, and of the suffixes with their padding."""
        suffixes = () if self.suffix.empty() else self.suffix.keys_and_values()
        pasts = [layer for layer in self.layers if layer is not None]
        return sum(int(x.nbytes) for x in (*suffixes, *pasts))

    def _compress(self) -> None:
        stops = self._ends or [self.suffix.size()] * len(self.layers)
        drop, layers = [0] * len(self.layers), list(self.layers)
        for row, (start, stop, codec) in enumerate(zip(self._starts, stops, self.codecs, strict=True)):
            layer = layers[row]
            assert not isinstance(layer, DenseLayer)
            drop[row] = due(min(stop, self.suffix.size()) - start, layer, codec)
            if drop[row]:
                keys, values = (x[row, :, start : start + drop[row]] for x in (self.suffix.keys, self.suffix.values))
                layers[row] = grown(layer, keys, values, codec)
        if any(drop):
            self._set_layers(layers)
            self._drop(drop)

    def _drop(self, tokens: list[int]) -> None:
        """Make the first ``tokens`` of each row padding, and drop what is padding in all rows."""
        starts = [start + n for start, n in zip(self._starts, tokens, strict=True)]
        unused = min(starts)
        suffix = self.suffix
        suffix.offset = suffix.offset - mx.array(tokens)
        suffix.left_padding = suffix.left_padding + mx.array(tokens) - unused
        suffix.keys, suffix.values = suffix.keys[:, :, unused:], suffix.values[:, :, unused:]
        suffix._idx -= unused
        self._starts = [start - unused for start in starts]
        if self._ends is not None:
            self._ends = [end - unused for end in self._ends]
