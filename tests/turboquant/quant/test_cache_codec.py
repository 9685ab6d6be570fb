"""Settings of compression that keep all tokens as they are."""

from __future__ import annotations

import mlx.core as mx
import pytest

from turboquant import CacheCodec, TurboQuantKVCache
from turboquant.kernels.encoding import encode_layer
from turboquant.quant.cache_codec import UNCOMPRESSED
from turboquant.quant.layer import EncodedLayer

WHOLE = CacheCodec(UNCOMPRESSED, UNCOMPRESSED)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_an_uncompressed_layer_is_what_it_was_made_from(dtype: mx.Dtype) -> None:
    keys, values = ((1e4 * mx.random.normal((2, 300, 64), key=mx.random.key(i))).astype(dtype) for i in (0, 1))
    first = encode_layer(keys[:, :200], values[:, :200], WHOLE)
    layer = EncodedLayer.join([first, encode_layer(keys[:, 200:], values[:, 200:], WHOLE, parent=first)])
    assert layer.tokens == 300
    assert (layer.sink_keys.dtype, layer.sink_values.dtype) == (dtype, dtype)
    restored = EncodedLayer.from_tensors(layer.tensors(), WHOLE)
    for found, expected in zip(restored.decode(), (keys, values), strict=True):
        assert mx.array_equal(found, expected.astype(mx.float32))
    assert layer.effective_bits == pytest.approx(8 * dtype.size, rel=0.02)
    assert WHOLE.nbytes(300, 64) == pytest.approx(layer.nbytes / 2 * (2 / dtype.size), rel=0.02)
    assert WHOLE.nbytes(300, 64, dtype.size) == layer.nbytes / 2


def test_single_layers_may_be_uncompressed() -> None:
    codec = CacheCodec(3, 3, layer_bits=((-1, UNCOMPRESSED, UNCOMPRESSED),))
    assert [codec.for_layer(layer, 3).is_uncompressed for layer in range(3)] == [False, False, True]


def test_keys_and_values_are_both_uncompressed_or_neither() -> None:
    with pytest.raises(ValueError, match="keys and values together"):
        CacheCodec(UNCOMPRESSED, 4)


def test_a_cache_that_compresses_itself_compresses() -> None:
    with pytest.raises(ValueError, match="2 to 8 bits"):
        TurboQuantKVCache(WHOLE)
