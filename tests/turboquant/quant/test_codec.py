"""The codec is as accurate and as small as promised, gives the same bits on every path, and stays finite."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant.quant import SUPPORTED_BITS
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.codec import Codec, Encoded, nearest_levels

LLOYD_MAX = {2: 0.1175, 3: 0.03455, 4: 0.0095, 5: 0.0025}


def same(a: Encoded, b: Encoded) -> bool:
    return bool(mx.array_equal(a.codes, b.codes)) and bool(
        mx.array_equal(a.scales.view(mx.uint16), b.scales.view(mx.uint16))
    )


def error(codec: Codec, x: mx.array, mean: mx.array | None = None) -> float:
    return float(mx.square(codec.decode(codec.encode(x, mean), mean) - x).mean() / mx.square(x).mean())


@pytest.mark.parametrize("bits", LLOYD_MAX)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_gaussian_vectors_have_the_error_of_lloyd_max(bits: int, dim: int) -> None:
    assert 0.9 * LLOYD_MAX[bits] < error(Codec(dim, bits), mx.random.normal((4000, dim))) < 1.02 * LLOYD_MAX[bits]


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_vectors_with_a_few_large_coordinates_have_little_more(bits: int) -> None:
    x = mx.random.normal((2000, 128)) * mx.where(mx.arange(128) % 32 == 5, 30.0, 1.0)
    assert error(Codec(128, bits), x) < 1.15 * LLOYD_MAX[bits]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("dim", [64, 128])
def test_norms_are_kept(bits: int, dim: int) -> None:
    x = mx.random.normal((500, dim)) * mx.random.uniform(0.1, 10, (500, 1))
    codec = Codec(dim, bits)
    norms, decoded = (np.linalg.norm(np.array(y), axis=-1) for y in (x, codec.decode(codec.encode(x))))
    np.testing.assert_allclose(decoded, norms, rtol=1e-3)


@pytest.mark.parametrize(("bits", "ratio"), [(4, 3.88), (3, 5.12)])
def test_compression_against_half_precision_at_head_dim_128(bits: int, ratio: float) -> None:
    x = mx.random.normal((2, 100, 128)).astype(mx.float16)
    assert x.nbytes / Codec(128, bits).encode(x).nbytes == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_a_vector_costs_its_bits_and_two_bytes(bits: int, dim: int) -> None:
    codec = Codec(dim, bits)
    encoded = codec.encode(mx.random.normal((3, 11, dim)))
    assert encoded.nbytes == 33 * (dim * bits // 8 + 2)
    assert codec.effective_bits == bits + 16 / dim
    assert encoded.tokens == 11


@settings(deadline=None, max_examples=25)
@given(
    bits=st.sampled_from(SUPPORTED_BITS),
    dim=st.sampled_from([63, 64, 72, 80, 96, 128]),
    heads=st.integers(1, 3),
    cuts=st.sets(st.integers(1, 39), max_size=5),
    with_mean=st.booleans(),
    dtype=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
)
def test_vectors_get_the_same_bits_one_by_one_in_chunks_at_once_and_in_a_batch(
    bits: int, dim: int, heads: int, cuts: set[int], with_mean: bool, dtype: mx.Dtype
) -> None:
    x = (mx.random.normal((heads, 40, dim)) + 0.2).astype(dtype)
    codec = Codec(dim, bits)
    mean = x.astype(mx.float32).mean(axis=1, keepdims=True) if with_mean else None
    at_once = codec.encode(x, mean)
    for edges in ([0, *sorted(cuts), 40], list(range(41))):
        parts = [codec.encode(x[:, a:b], mean) for a, b in itertools.pairwise(edges)]
        assert same(at_once, Encoded.concatenate(parts))
    batched = codec.encode(mx.stack([mx.random.normal(x.shape).astype(dtype), x]), mean)
    assert same(at_once, Encoded(batched.codes[1], batched.scales[1]))
    transposed = mx.contiguous(x.swapaxes(0, 1)).swapaxes(0, 1)  # the layout of a model's keys
    assert same(at_once, codec.encode(transposed, mean))


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_codes_are_the_nearest_levels(bits: int) -> None:
    levels = np.array(Codec(64, bits).levels)
    unit = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    nearest = np.abs(unit[..., None] - levels).argmin(-1)
    np.testing.assert_array_equal(np.array(nearest_levels(bits)(mx.array(unit))), nearest)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_zero_vectors_stay_close_to_zero(bits: int) -> None:
    codec = Codec(64, bits)
    zeros, mean = mx.zeros((3, 64)), mx.ones((64,))
    for given_mean in (None, mean):
        decoded = codec.decode(codec.encode(zeros, given_mean), given_mean)
        assert float(mx.abs(decoded).max()) < 1e-6


def test_a_vector_equal_to_the_mean_is_restored() -> None:
    codec, mean = Codec(128, 2), mx.random.normal((128,))
    encoded = codec.encode(mean[None], mean)
    assert float(encoded.scales[0]) > 0
    np.testing.assert_allclose(np.array(codec.decode(encoded, mean)[0]), np.array(mean), atol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-7, 1e5, 1e7, 1e15, 1e20, 1e38])
@pytest.mark.parametrize("with_mean", [False, True])
def test_vectors_of_any_magnitude_are_restored_finite_and_not_longer(magnitude: float, with_mean: bool) -> None:
    codec, mean = Codec(64, 4), mx.ones((64,)) if with_mean else None
    encoded = codec.encode(mx.random.normal((20, 64)) * magnitude, mean)
    decoded = codec.decode(encoded, mean)
    assert bool(mx.isfinite(encoded.scales).all())
    assert bool((mx.abs(encoded.scales) > 0).all())
    assert bool(mx.isfinite(decoded).all())
    assert float(mx.abs(decoded).max()) < max(5 * magnitude, 1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_input_is_encoded_as_the_float32_of_it(dtype: mx.Dtype) -> None:
    x = mx.random.normal((5, 64)).astype(dtype)
    codec = Codec(64, 4)
    assert same(codec.encode(x), codec.encode(x.astype(mx.float32)))
    assert codec.decode(codec.encode(x), dtype=dtype).dtype == dtype


def test_the_sign_of_the_scale_says_whether_the_mean_was_subtracted() -> None:
    codec, mean = Codec(64, 4), mx.full((64,), 3.0)
    near, far = mx.random.normal((5, 64)) + 3, mx.random.normal((5, 64)) * 0.1
    assert bool((codec.encode(near, mean).scales > 0).all())
    assert bool((codec.encode(far, mean).scales < 0).all())
    assert bool((codec.encode(near).scales < 0).all())


def test_subtracting_the_mean_helps_vectors_with_an_offset_and_never_hurts_short_ones() -> None:
    codec = Codec(128, 4)
    mean = mx.random.normal((128,)) * 5
    offset, short = mx.random.normal((500, 128)) + mean, mx.random.normal((500, 128)) * 0.05
    assert error(codec, offset, mean) < error(codec, offset) / 10
    assert error(codec, short, mean) == error(codec, short)


def test_an_empty_array_of_vectors_can_be_encoded() -> None:
    codec = Codec(80, 5)
    encoded = codec.encode(mx.zeros((2, 0, 80)))
    assert encoded.codes.shape == (2, 0, codec.words)
    assert codec.decode(encoded).shape == (2, 0, 80)


@pytest.mark.parametrize("dim", [1, 63, 65, 128])
def test_vectors_of_another_size_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"vectors of {dim} coordinates given to a codec for 64"):
        Codec(64).encode(mx.zeros((2, dim)))


def test_unusable_codecs_are_refused_when_made() -> None:
    with pytest.raises(ValueError, match="7 bits"):
        Codec(64, 7)
    with pytest.raises(ValueError, match="dimensions"):
        Codec(1)
    with pytest.raises(ValueError, match="1 bits"):
        CacheCodec(value_bits=1)
    with pytest.raises(ValueError, match="negative"):
        CacheCodec(window=-1)


def test_every_field_of_a_cache_codec_is_in_its_identity() -> None:
    variants = [
        CacheCodec(),
        CacheCodec(key_bits=5),
        CacheCodec(value_bits=5),
        CacheCodec(sinks=5),
        CacheCodec(window=5),
        CacheCodec(extra_bits=0.5),
        CacheCodec(query_aware=False),
        CacheCodec(layer_bits=((0, 8, 8),)),
        CacheCodec(seed=5),
        CacheCodec(coding="trellis"),
    ]
    assert len({codec.identity for codec in variants}) == len(variants)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 17, 100, 1000, 100_000])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_finer_tokens_cost_no_more_than_extra_bits(tokens: int, bits: int, known: bool) -> None:
    codec = CacheCodec(bits, bits, extra_bits=0.2)
    window, attended = codec.fine_tokens(tokens, known)
    assert 0 <= window <= 128
    assert window + attended <= max(0, tokens - codec.sinks)
    assert (window + attended) * (codec.fine.key_bits - bits) <= 0.2 * tokens
    assert known or attended == 0
    if known and bits < 8 and tokens >= 1000:
        assert attended >= window > 0


def test_without_extra_bits_there_are_no_finer_tokens() -> None:
    assert CacheCodec(extra_bits=0).fine_tokens(5000, True) == (0, 0)


@pytest.mark.parametrize("extra_bits", [-0.1, 17.0, float("nan")])
def test_extra_bits_out_of_range_are_refused(extra_bits: float) -> None:
    with pytest.raises(ValueError, match="extra_bits"):
        CacheCodec(extra_bits=extra_bits)


def test_a_layer_can_have_other_bits() -> None:
    codec = CacheCodec(4, 3, layer_bits=((0, 8, 6), (-1, 5, 5)))
    pairs = [(layer.key_bits, layer.value_bits) for layer in (codec.for_layer(index, 4) for index in range(4))]
    assert pairs == [(8, 6), (4, 3), (4, 3), (5, 5)]
    assert codec.identity != CacheCodec(4, 3).identity


@pytest.mark.parametrize("layer", [4, 40, -5])
def test_bits_of_a_layer_that_does_not_exist_are_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer_bits names layer {layer}, but the model has 4 layers: 0 to 3, or"):
        CacheCodec(layer_bits=((0, 8, 8), (layer, 8, 8))).for_layer(0, 4)


def test_bits_of_a_layer_are_checked_too() -> None:
    with pytest.raises(ValueError, match="7"):
        CacheCodec(layer_bits=((0, 4, 7),))
