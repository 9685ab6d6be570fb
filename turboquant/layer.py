"""One attention layer's K/V of a finished context, compressed.

Knows which tokens are kept as they are (the first ones, attention sinks, and a window over the last ones) and which
are encoded. Knows nothing of prompts, batches or files; ``tensors`` and ``from_tensors`` are all that those need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from turboquant.codec import CacheCodec, Codec, Encoded

ENCODE_TILE = 4096  # tokens encoded at a time, so that the encoder's float32 scratch stays small


@dataclass(frozen=True)
class EncodedLayer:
    """Keys and values of T tokens: S sinks, then E encoded ones, then W in the window; T = S + E + W.

    sink_keys, sink_values: (n_kv_heads, S, head_dim), 16-bit floats.
    keys, values: ``Encoded`` of (n_kv_heads, E) vectors.
    key_mean, value_mean: (n_kv_heads, 1, head_dim) float32, frozen: removed where that shortens a vector.
    window_keys, window_values: (n_kv_heads, W, head_dim), 16-bit floats.

    The head_dim of values may differ from that of keys.
    """

    codec: CacheCodec
    sink_keys: mx.array
    sink_values: mx.array
    keys: Encoded
    values: Encoded
    key_mean: mx.array
    value_mean: mx.array
    window_keys: mx.array
    window_values: mx.array

    @classmethod
    def encode(cls, keys: mx.array, values: mx.array, codec: CacheCodec) -> EncodedLayer:
        """Compress keys (n_kv_heads, T, head_dim) and values (n_kv_heads, T, value_dim) of a finished context."""
        tokens = keys.shape[1]
        first = min(codec.sinks, tokens)
        last = max(first, tokens - codec.window_for(tokens))
        encoded_keys, key_mean = _encode(keys[:, first:last], codec.keys(keys.shape[-1]))
        encoded_values, value_mean = _encode(values[:, first:last], codec.values(values.shape[-1]))
        layer = cls(
            codec=codec,
            sink_keys=_half(keys[:, :first]),
            sink_values=_half(values[:, :first]),
            keys=encoded_keys,
            values=encoded_values,
            key_mean=key_mean,
            value_mean=value_mean,
            window_keys=_half(keys[:, last:]),
            window_values=_half(values[:, last:]),
        )
        mx.eval(list(layer.tensors().values()))
        return layer

    @property
    def key_codec(self) -> Codec:
        """The codec of the keys."""
        return self.codec.keys(self.key_mean.shape[-1])

    @property
    def value_codec(self) -> Codec:
        """The codec of the values."""
        return self.codec.values(self.value_mean.shape[-1])

    @property
    def tokens(self) -> int:
        """Tokens held, those kept as they are included."""
        return int(self.sink_keys.shape[1] + self.keys.tokens + self.window_keys.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(int(x.nbytes) for x in self.tensors().values())

    @property
    def effective_bits(self) -> float:
        """Bits a coordinate, with scales, means, sinks and window counted."""
        heads = self.key_mean.shape[0]
        coordinates = heads * self.tokens * (self.key_mean.shape[-1] + self.value_mean.shape[-1])
        return 8 * self.nbytes / max(1, coordinates)

    def decode(self) -> tuple[mx.array, mx.array]:
        """The reconstructed keys and values, (n_kv_heads, T, head_dim) float32 each."""
        keys = self.key_codec.decode(self.keys, self.key_mean)
        values = self.value_codec.decode(self.values, self.value_mean)
        return (
            mx.concatenate([self.sink_keys.astype(mx.float32), keys, self.window_keys.astype(mx.float32)], axis=1),
            mx.concatenate(
                [self.sink_values.astype(mx.float32), values, self.window_values.astype(mx.float32)], axis=1
            ),
        )

    def dense(self, dtype: mx.Dtype) -> DenseLayer:
        """The layer decoded, in ``dtype``, saturating."""
        largest = float(mx.finfo(dtype).max)
        keys, values = (mx.clip(x, -largest, largest) for x in self.decode())
        layer = DenseLayer(keys.astype(dtype), values.astype(dtype))
        mx.eval(layer.keys, layer.values)
        return layer

    def tensors(self) -> dict[str, mx.array]:
        """Everything but the codec, by name; the inverse of ``from_tensors``."""
        return {
            "sink_keys": self.sink_keys,
            "sink_values": self.sink_values,
            "key_codes": self.keys.codes,
            "key_scales": self.keys.scales,
            "value_codes": self.values.codes,
            "value_scales": self.values.scales,
            "key_mean": self.key_mean,
            "value_mean": self.value_mean,
            "window_keys": self.window_keys,
            "window_values": self.window_values,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, mx.array], codec: CacheCodec) -> EncodedLayer:
        """Rebuild a layer. Raises ValueError where a tensor is missing or shapes and dtypes don't fit together."""
        try:
            layer = cls(
                codec=codec,
                sink_keys=tensors["sink_keys"],
                sink_values=tensors["sink_values"],
                keys=Encoded(tensors["key_codes"], tensors["key_scales"]),
                values=Encoded(tensors["value_codes"], tensors["value_scales"]),
                key_mean=tensors["key_mean"],
                value_mean=tensors["value_mean"],
                window_keys=tensors["window_keys"],
                window_values=tensors["window_values"],
            )
        except KeyError as error:
            raise ValueError(f"the layer's tensor {error} is missing") from None
        layer._check()
        return layer

    def _check(self) -> None:
        if self.key_mean.ndim != 3 or self.value_mean.ndim != 3:
            raise ValueError("the layer's means are not (n_kv_heads, 1, head_dim)")
        if self.keys.scales.ndim != 2:
            raise ValueError("the layer's scales are not (n_kv_heads, tokens)")
        heads, encoded = self.key_mean.shape[0], self.keys.tokens
        first, last = self.sink_keys.shape[1:2], self.window_keys.shape[1:2]
        for name, kind, codec, mean in (
            ("key", self.keys, self.key_codec, self.key_mean),
            ("value", self.values, self.value_codec, self.value_mean),
        ):
            sinks = self.sink_keys if name == "key" else self.sink_values
            window = self.window_keys if name == "key" else self.window_values
            expected = [
                (kind.codes, (heads, encoded, codec.words), (mx.uint32,)),
                (kind.scales, (heads, encoded), (mx.float16,)),
                (mean, (heads, 1, codec.head_dim), (mx.float32,)),
                (sinks, (heads, *first, codec.head_dim), (mx.float16, mx.bfloat16)),
                (window, (heads, *last, codec.head_dim), (mx.float16, mx.bfloat16)),
            ]
            for tensor, shape, dtypes in expected:
                if tensor.shape != shape or tensor.dtype not in dtypes:
                    raise ValueError(f"a {name} tensor is {tensor.dtype} {tensor.shape}, expected {dtypes[0]} {shape}")


@dataclass(frozen=True)
class DenseLayer:
    """An encoded layer decoded once, to be attended without decoding each time: what it holds is the same.

    keys, values: (n_kv_heads, T, head_dim) floats.
    """

    keys: mx.array
    values: mx.array

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return int(self.keys.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return int(self.keys.nbytes + self.values.nbytes)


def _encode(x: mx.array, codec: Codec) -> tuple[Encoded, mx.array]:
    """Encode (n_kv_heads, E, head_dim), tile by tile, about its mean over E; returns the mean as well."""
    if x.shape[1] == 0:
        mean = mx.zeros((x.shape[0], 1, x.shape[2]), mx.float32)
        return codec.encode(x, mean), mean
    mean = x.astype(mx.float32).mean(axis=1, keepdims=True)
    parts = []
    for start in range(0, x.shape[1], ENCODE_TILE):
        part = codec.encode(x[:, start : start + ENCODE_TILE], mean)
        mx.eval(part.codes, part.scales)
        parts.append(part)
    return (parts[0] if len(parts) == 1 else Encoded.concatenate(parts)), mean


def _half(x: mx.array) -> mx.array:
    """As 16-bit floats: bfloat16 stays, float32 (a model run on a CPU) becomes float16, saturating."""
    if x.dtype == mx.bfloat16:
        return mx.contiguous(x)
    return mx.contiguous(mx.clip(x, -65504.0, 65504.0).astype(mx.float16))
