"""A layer of compressed K/V holds every token once, counts its bytes, and refuses tensors that do not fit."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from turboquant import CacheCodec, EncodedLayer
from turboquant.kernels.encoding import encode_layer
from turboquant.quant.codec import Encoded


def kv(tokens: int, heads: int = 2, key_dim: int = 64, value_dim: int = 64) -> tuple[mx.array, mx.array]:
    return mx.random.normal((heads, tokens, key_dim)) + 1, mx.random.normal((heads, tokens, value_dim))


def relative_error(decoded: mx.array, exact: mx.array) -> float:
    return float(mx.square(decoded - exact).sum() / mx.square(exact).sum())


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 31, 127, 128, 129, 133, 700])
@pytest.mark.parametrize("codec", [CacheCodec(), CacheCodec(sinks=0, window=0), CacheCodec(8, 8, sinks=40, window=3)])
def test_every_token_is_held_once_in_order(tokens: int, codec: CacheCodec) -> None:
    keys, values = kv(tokens)
    layer = encode_layer(keys, values, codec)
    decoded_keys, decoded_values = layer.decode()
    assert layer.tokens == tokens
    assert decoded_keys.shape == keys.shape
    assert decoded_values.shape == values.shape
    assert relative_error(decoded_keys, keys) < 0.012
    assert relative_error(decoded_values, values) < 0.012


def test_sinks_are_not_compressed_and_the_window_is_finer() -> None:
    keys, values = (x.astype(mx.float16) for x in kv(2000))
    codec = CacheCodec(2, 3, sinks=4, window=20)
    decoded = encode_layer(keys, values, codec).decode()
    for exact, got in zip((keys.astype(mx.float32), values.astype(mx.float32)), decoded, strict=True):
        assert mx.array_equal(got[:, :4], exact[:, :4].astype(mx.float32))
        assert not mx.array_equal(got[:, 4:8], exact[:, 4:8].astype(mx.float32))
        assert relative_error(got[:, 1980:], exact[:, 1980:]) < 0.003
        assert relative_error(got[:, 4:1980], exact[:, 4:1980]) > 0.02


@pytest.mark.parametrize(
    ("dtype", "kept"), [(mx.float32, mx.float16), (mx.float16, mx.float16), (mx.bfloat16, mx.bfloat16)]
)
def test_sinks_take_two_bytes_per_number(dtype: mx.Dtype, kept: mx.Dtype) -> None:
    keys, values = (x.astype(dtype) for x in kv(500))
    layer = encode_layer(keys, values, CacheCodec())
    assert {layer.sink_keys.dtype, layer.sink_values.dtype} == {kept}


def test_sinks_too_large_for_16_bits_stay_finite() -> None:
    layer = encode_layer(mx.full((1, 10, 64), 1e9), mx.full((1, 10, 64), -1e9), CacheCodec())
    assert all(bool(mx.isfinite(x).all()) for x in layer.decode())


@pytest.mark.parametrize("bits", [(2, 2), (4, 4), (8, 2), (3, 5)])
@pytest.mark.parametrize("tokens", [300, 3000])
def test_effective_bits_count_all_tensors(bits: tuple[int, int], tokens: int) -> None:
    layer = encode_layer(*kv(tokens, key_dim=128, value_dim=128), CacheCodec(*bits))
    assert layer.nbytes == sum(x.nbytes for x in layer.tensors().values())
    assert layer.effective_bits == pytest.approx(8 * layer.nbytes / (2 * 2 * tokens * 128))
    assert CacheCodec(*bits).nbytes(tokens, 128) == pytest.approx(layer.nbytes / 2, rel=0.05)
    least = sum(bits) / 2 + 16 / 128
    fixed = (16 * 16 + 32) / tokens  # sinks and means, which matter little in a long context
    assert least < layer.effective_bits < least + 0.2 + fixed


def test_a_constant_offset_of_the_keys_does_not_increase_the_error() -> None:
    keys, values = mx.random.normal((2, 900, 64)), mx.random.normal((2, 900, 64))
    offset = 100 * mx.random.normal((2, 1, 64))
    plain = encode_layer(keys, values, CacheCodec(window=0)).decode()[0] - keys
    moved = encode_layer(keys + offset, values, CacheCodec(window=0)).decode()[0] - (keys + offset)
    assert float(mx.square(moved[:, 4:]).mean()) < 1.1 * float(mx.square(plain[:, 4:]).mean())


def test_the_size_of_the_encoder_s_tiles_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = kv(1000)
    whole = encode_layer(keys, values, CacheCodec()).tensors()
    monkeypatch.setattr("turboquant.kernels.encoding.ENCODE_TILE", 77)
    tiled = encode_layer(keys, values, CacheCodec()).tensors()
    assert all(mx.array_equal(whole[name], tiled[name]) for name in whole)


@pytest.mark.parametrize("tokens", [1, 3, 10, 400])
def test_a_layer_can_be_rebuilt_from_its_tensors(tokens: int, random_layer: Callable[..., EncodedLayer]) -> None:
    layer = random_layer(tokens, CacheCodec(3, 5), key_dim=80, value_dim=64)
    again = EncodedLayer.from_tensors(layer.tensors(), layer.codec)
    assert all(mx.array_equal(a, b) for a, b in zip(layer.decode(), again.decode(), strict=True))


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (CacheCodec(4, 4, coding="trellis"), "coding scalar and trellis"),
        (CacheCodec(4, 4, seed=1), "seed 0 and 1"),
        (CacheCodec(4, 3), "value_bits 4 and 3"),
        (CacheCodec(16, 16), "key_bits 4 and 16"),
    ],
)
def test_layers_of_different_codecs_are_not_joined(other: CacheCodec, differing: str) -> None:
    first = encode_layer(*kv(300), CacheCodec(4, 4))
    behind = [encode_layer(*kv(256), codec, parent=first) for codec in (CacheCodec(4, 4), other)]
    assert EncodedLayer.join([first, behind[0]]).tokens == 556
    with pytest.raises(ValueError, match=f"different codecs cannot be joined: {differing}"):
        EncodedLayer.join([first, behind[1]])


TENSORS = [
    "sink_keys",
    "sink_values",
    "key_codes",
    "key_scales",
    "value_codes",
    "value_scales",
    "key_mean",
    "value_mean",
    "fine_key_codes",
    "fine_key_scales",
    "fine_value_codes",
    "fine_value_scales",
]


@pytest.fixture
def tensors(random_layer: Callable[..., EncodedLayer]) -> dict[str, mx.array]:
    return random_layer(500, CacheCodec(), key_dim=64, value_dim=128).tensors()


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_refused_by_name(name: str, tensors: dict[str, mx.array]) -> None:
    del tensors[name]
    with pytest.raises(ValueError, match=f"{name}.* is missing"):
        EncodedLayer.from_tensors(tensors, CacheCodec())


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[..., :-1],
        lambda x: x[:, :-1],
        lambda x: x[:1],
        lambda x: x[None],
        lambda x: x[0],
        lambda x: x.reshape(-1)[0],
        lambda x: x.flatten(),
        lambda x: mx.concatenate([x, x], axis=1),
        lambda x: x.astype(mx.int32),
        lambda x: x.astype(mx.float64 if False else mx.complex64),
        lambda x: x[:0],
    ],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(
    name: str, change: Callable[[mx.array], mx.array], tensors: dict[str, mx.array]
) -> None:
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=r"expected|are not"):
        EncodedLayer.from_tensors(tensors, CacheCodec())


def test_codes_of_other_bits_are_refused(tensors: dict[str, mx.array]) -> None:
    with pytest.raises(ValueError, match="key tensor"):
        EncodedLayer.from_tensors(tensors, CacheCodec(key_bits=3))


def test_a_dense_layer_is_the_layer_decoded(random_layer: Callable[..., EncodedLayer]) -> None:
    layer = random_layer(300, CacheCodec())
    dense = layer.dense(mx.float32)
    assert dense.tokens == 300
    assert dense.nbytes == 2 * 2 * 300 * 64 * 4
    np.testing.assert_array_equal(np.array(dense.keys), np.array(layer.decode()[0]))


def test_a_dense_layer_in_half_precision_stays_finite() -> None:
    spread = mx.random.normal((1, 300, 64)) * 30000
    dense = encode_layer(spread, spread, CacheCodec(2, 2)).dense(mx.float16)
    assert bool(mx.isfinite(dense.keys).all())
    assert bool(mx.isfinite(dense.values).all())


def test_slices_and_concatenation_are_inverse(random_layer: Callable[..., EncodedLayer]) -> None:
    keys = random_layer(300, CacheCodec()).keys
    parts = [keys.slice_tokens(0, 10), keys.slice_tokens(10, 11), keys.slice_tokens(11, keys.tokens)]
    joined = Encoded.concatenate(parts)
    assert mx.array_equal(joined.codes, keys.codes)
    assert mx.array_equal(joined.scales, keys.scales)
