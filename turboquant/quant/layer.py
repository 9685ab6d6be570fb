"""The compressed keys and values of a finished context in one attention layer.

A layer has three kinds of tokens: attention sinks, which are the first tokens and are not compressed; finer tokens,
which are the last ones and those that the context's own queries attend to most; and all others. kernels/encoding.py
makes layers. Later queries attend to all tokens, so the order of tokens does not matter. ``tensors`` and
``from_tensors`` are for files and caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import mlx.core as mx

from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.codec import Codec, Encoded
from turboquant.quant.trellis import BLOCK, TrellisCodec


@dataclass(frozen=True)
class EncodedPart:
    """Tokens of one layer that have the same codecs: ``Encoded`` keys and values of (n_kv_heads, N) vectors."""

    keys: Encoded
    values: Encoded
    key_codec: Codec
    value_codec: Codec


@dataclass(frozen=True)
class EncodedLayer:
    """Keys and values of T tokens: S sinks, E encoded tokens and F finer ones; T = S + E + F.

    sink_keys, sink_values: (n_kv_heads, S, head_dim), 16-bit floats. If the codec does not compress, these are
        all tokens, in the model's dtype.
    keys, values: ``Encoded`` of (n_kv_heads, E) vectors, in the order of the context.
    fine_keys, fine_values: ``Encoded`` of (n_kv_heads, F) vectors. Each head has its own choice of finer tokens.
    key_mean, value_mean: (n_kv_heads, 1, head_dim) float32; subtracted from those vectors that they make shorter.
    derived: tensors that a backend computes once from the others and keeps here.

    The head_dim of values may differ from that of keys.
    """

    codec: CacheCodec
    sink_keys: mx.array
    sink_values: mx.array
    keys: Encoded
    values: Encoded
    fine_keys: Encoded
    fine_values: Encoded
    key_mean: mx.array
    value_mean: mx.array
    derived: dict[str, mx.array] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def join(cls, layers: Sequence[EncodedLayer]) -> EncodedLayer:
        """Join layers of consecutive tokens. Raises ValueError if their codecs or their means differ.

        Each layer must have been encoded with the first one as ``parent``, see ``encode_layer``.
        """
        first = layers[0]
        if len(layers) == 1:
            return first
        for other in layers[1:]:
            first.check_codec(other.codec)
            same = mx.array_equal(other.key_mean, first.key_mean) & mx.array_equal(other.value_mean, first.value_mean)
            if not same.item():
                raise ValueError("layers that were encoded with different means cannot be joined")
        joined = replace(
            first,
            sink_keys=mx.concatenate([layer.sink_keys for layer in layers], axis=1),
            sink_values=mx.concatenate([layer.sink_values for layer in layers], axis=1),
            keys=Encoded.concatenate([layer.keys for layer in layers]),
            values=Encoded.concatenate([layer.values for layer in layers]),
            fine_keys=Encoded.concatenate([layer.fine_keys for layer in layers]),
            fine_values=Encoded.concatenate([layer.fine_values for layer in layers]),
        )
        mx.eval(list(joined.tensors().values()))
        return joined

    def check_codec(self, codec: CacheCodec) -> None:
        """Raise ValueError if a layer of another codec cannot be joined with this one.

        Sinks may differ: a context's first tokens are in its first layer, and layers behind it have none left.
        """
        ours, theirs = (asdict(replace(x, sinks=0, layer_bits=())) for x in (self.codec, codec))
        for name, value in ours.items():
            if theirs[name] != value:
                raise ValueError(f"layers of different codecs cannot be joined: {name} {value} and {theirs[name]}")

    @property
    def key_codec(self) -> Codec:
        """Return the codec of the keys that are not finer."""
        return self.codec.keys(self.key_mean.shape[-1])

    @property
    def value_codec(self) -> Codec:
        """Return the codec of the values that are not finer."""
        return self.codec.values(self.value_mean.shape[-1])

    @property
    def parts(self) -> list[EncodedPart]:
        """Return the encoded tokens in parts with the same codecs, without empty parts."""
        key_dim, value_dim = self.key_mean.shape[-1], self.value_mean.shape[-1]
        parts = [
            EncodedPart(keys, values, codec.keys(key_dim), codec.values(value_dim))
            for keys, values, codec in (
                (self.keys, self.values, self.codec),
                (self.fine_keys, self.fine_values, self.codec.fine),
            )
        ]
        return [part for part in parts if part.keys.tokens]

    @property
    def tokens(self) -> int:
        """Count the tokens, with the sinks."""
        return int(self.sink_keys.shape[1] + self.keys.tokens + self.fine_keys.tokens)

    @property
    def nbytes(self) -> int:
        """Count the bytes of all tensors."""
        return sum(int(x.nbytes) for x in self.tensors().values())

    @property
    def effective_bits(self) -> float:
        """Count the bits per coordinate, with those of scales, means, sinks and finer tokens."""
        heads = self.key_mean.shape[0]
        coordinates = heads * self.tokens * (self.key_mean.shape[-1] + self.value_mean.shape[-1])
        return 8 * self.nbytes / max(1, coordinates)

    def decode(self) -> tuple[mx.array, mx.array]:
        """Reconstruct keys and values, (n_kv_heads, T, head_dim) float32 each: sinks, encoded tokens, finer tokens."""
        keys, values = [self.sink_keys.astype(mx.float32)], [self.sink_values.astype(mx.float32)]
        for part in self.parts:
            keys.append(part.key_codec.decode(part.keys, self.key_mean))
            values.append(part.value_codec.decode(part.values, self.value_mean))
        return mx.concatenate(keys, axis=1), mx.concatenate(values, axis=1)

    def dense(self, dtype: mx.Dtype) -> DenseLayer:
        """Decode the layer to ``dtype``. Numbers that are too large for it become its largest."""
        largest = float(mx.finfo(dtype).max)
        keys, values = (mx.clip(x, -largest, largest) for x in self.decode())
        layer = DenseLayer(keys.astype(dtype), values.astype(dtype))
        mx.eval(layer.keys, layer.values)
        return layer

    def tensors(self) -> dict[str, mx.array]:
        """Return all tensors by name. Together with the codec they are the layer, see ``from_tensors``."""
        return {
            "sink_keys": self.sink_keys,
            "sink_values": self.sink_values,
            "key_codes": self.keys.codes,
            "key_scales": self.keys.scales,
            "value_codes": self.values.codes,
            "value_scales": self.values.scales,
            "fine_key_codes": self.fine_keys.codes,
            "fine_key_scales": self.fine_keys.scales,
            "fine_value_codes": self.fine_values.codes,
            "fine_value_scales": self.fine_values.scales,
            "key_mean": self.key_mean,
            "value_mean": self.value_mean,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, mx.array], codec: CacheCodec) -> EncodedLayer:
        """Build a layer from its tensors. Raises ValueError if one is missing, or shapes or dtypes do not fit."""
        try:
            layer = cls(
                codec=codec,
                sink_keys=tensors["sink_keys"],
                sink_values=tensors["sink_values"],
                keys=Encoded(tensors["key_codes"], tensors["key_scales"]),
                values=Encoded(tensors["value_codes"], tensors["value_scales"]),
                fine_keys=Encoded(tensors["fine_key_codes"], tensors["fine_key_scales"]),
                fine_values=Encoded(tensors["fine_value_codes"], tensors["fine_value_scales"]),
                key_mean=tensors["key_mean"],
                value_mean=tensors["value_mean"],
            )
        except KeyError as error:
            raise ValueError(f"the layer's tensor {error} is missing") from None
        layer._check_shapes()
        return layer

    def _check_shapes(self) -> None:
        if self.key_mean.ndim != 3 or self.value_mean.ndim != 3:
            raise ValueError("the layer's means are not (n_kv_heads, 1, head_dim)")
        if self.keys.scales.ndim != 2 or self.fine_keys.scales.ndim != 2:
            raise ValueError("the layer's scales are not (n_kv_heads, tokens)")
        heads, first = self.key_mean.shape[0], self.sink_keys.shape[1:2]
        sink_dtypes = (mx.float16, mx.bfloat16, *((mx.float32,) if self.codec.is_uncompressed else ()))
        for name, own, fine, mean, sinks in (
            ("key", self.keys, self.fine_keys, self.key_mean, self.sink_keys),
            ("value", self.values, self.fine_values, self.value_mean, self.sink_values),
        ):
            dim = mean.shape[2]
            expected = [
                (mean, (heads, 1, dim), (mx.float32,)),
                (sinks, (heads, *first, dim), sink_dtypes),
            ]
            for encoded, tokens, codec in (
                (own, self.keys.tokens, self.codec),
                (fine, self.fine_keys.tokens, self.codec.fine),
            ):
                vectors = codec.keys(dim) if name == "key" else codec.values(dim)
                if isinstance(vectors, TrellisCodec) and tokens % BLOCK:
                    raise ValueError(f"{tokens} tokens are not whole blocks of {BLOCK}, as trellis codes need")
                words = vectors.words
                expected.append((encoded.codes, (heads, tokens, words), (mx.uint32,)))
                expected.append((encoded.scales, (heads, tokens), (mx.float16,)))
            for tensor, shape, dtypes in expected:
                if tensor.shape != shape or tensor.dtype not in dtypes:
                    raise ValueError(f"a {name} tensor is {tensor.dtype} {tensor.shape}, expected {dtypes[0]} {shape}")


@dataclass(frozen=True)
class DenseLayer:
    """An encoded layer that was decoded once, so that attention need not decode it at each step.

    keys, values: (n_kv_heads, T, head_dim) floats.
    """

    keys: mx.array
    values: mx.array

    @property
    def tokens(self) -> int:
        """Count the tokens."""
        return int(self.keys.shape[1])

    @property
    def nbytes(self) -> int:
        """Count the bytes of keys and values."""
        return int(self.keys.nbytes + self.values.nbytes)
