"""A cache that compresses its own past as it grows, for prefill and generation in bounded memory.

Knows mlx-lm's cache contract and the codec; a past that is compressed once, when it is finished, is prefix.py's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from turboquant.cache import Fork
from turboquant.codec import CacheCodec, Encoded
from turboquant.layer import DenseLayer, EncodedLayer


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
