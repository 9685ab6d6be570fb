"""Trellis codes have the documented order of bits, lose less than scalar codes, and keep the promises of the codec."""

from __future__ import annotations

import itertools
import json
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from turboquant import CacheCodec, EncodedLayer, TurboQuantKVCache
from turboquant.attention import cpu, reference
from turboquant.kernels.encoding import encode_layer
from turboquant.quant.cache_codec import dump_codec, parse_codec
from turboquant.quant.codec import Codec
from turboquant.quant.query_stats import QueryCollector
from turboquant.quant.trellis import BLOCK, CODES, TrellisCodec
from turboquant.quant.viterbi import NODE_BITS, _halves, search

Of = Literal["keys", "values"]
KINDS: list[tuple[Of, int]] = [(of, bits) for of in ("keys", "values") for bits in (2, 3, 4)]  # type: ignore[misc]


def vectors(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(3).normal(size=shape).astype(np.float32))


def metric_of(heads: int, dim: int) -> NDArray[np.float64]:
    looks = np.random.default_rng(4).normal(size=(heads, 3 * dim, dim)) * np.linspace(0.2, 3, dim)
    return looks.swapaxes(1, 2) @ looks


def codes_of(words: NDArray[np.uint32], codec: TrellisCodec) -> NDArray[np.int64]:
    """Read the codes (T, dim) of one head bit by bit, as the text of trellis.py describes their order."""
    bits, dim = codec.bits, codec.head_dim
    found = np.zeros((len(words), dim), np.int64)
    for block, row, lane in itertools.product(range(len(words) // BLOCK), range(dim // 8), range(32)):
        begin = (block * dim // 8 + row) * 32 * bits
        places = [
            begin + word // 2 * 64 + (lane * 2 + word % 2 if word + 1 < bits or bits % 2 == 0 else lane)
            for word in range(bits)
        ]
        stream = sum(int(words.reshape(-1)[place]) << (32 * i) for i, place in enumerate(places))
        for token, string, k in itertools.product(range(16), range(2), range(bits)):
            bit = stream >> (2 * (bits * token + k) + string) & 1
            g, c = divmod(lane, 4)
            if codec.of == "keys":
                place = block * BLOCK + 16 * g + token, 8 * row + 2 * c + string
            else:
                place = block * BLOCK + 32 * c + 16 * string + token, 8 * row + g
            found[place] |= bit << (bits - 1 - k)
    return found


def strings_of(codec: TrellisCodec) -> list[tuple[NDArray[np.int64], int, int]]:
    """The tokens of a block's strings, their coordinate, and which of a pair they are."""
    every = np.arange(BLOCK)
    if codec.of == "keys":
        return [(every, d, d % 2) for d in range(codec.head_dim)]
    return [(every[every // 16 % 2 == string], d, string) for d in range(codec.head_dim) for string in (0, 1)]


@pytest.mark.parametrize(("of", "bits"), KINDS)
def test_the_bits_of_a_string_give_its_levels(of: Of, bits: int) -> None:
    codec = TrellisCodec(32, bits, of=of)
    words = np.random.default_rng(bits).integers(0, 1 << 32, (1, 2 * BLOCK, bits), np.uint32)
    expected, codes = np.zeros((2 * BLOCK, 32), np.float32), codes_of(words[0], codec)
    for block, (tokens, d, which) in itertools.product(range(2), strings_of(codec)):
        code = CODES[bits][which]
        string = "".join(f"{x:0{bits}b}" for x in codes[block * BLOCK + tokens, d])
        for i, token in enumerate(tokens):
            end = len(string) + bits * (i + 1)
            state = int((string + string)[end - NODE_BITS - bits : end], 2)
            expected[block * BLOCK + token, d] = code.table[state]
    assert np.array_equal(codec.decode_levels(np, words)[0], expected)
    assert np.array_equal(np.array(codec.decode_levels(mx, mx.array(words)))[0], expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_depend_on_a_row_and_parities(bits: int) -> None:
    for code in CODES[bits]:
        states = np.arange(1 << code.log_states)
        node, rows = states >> bits, 1 << bits
        row = states % rows ^ node >> (NODE_BITS - bits)
        column = [int("".join(str((int(n) & mask).bit_count() % 2) for mask in code.parities), 2) for n in node]
        assert np.array_equal(code.table, code.levels[row, column])
        assert code.levels.size == 32
        assert np.array_equal(code.levels, code.levels.astype(np.float16))


@pytest.mark.parametrize(("of", "bits"), KINDS)
def test_numbers_lose_less_than_in_scalar_codes(of: Of, bits: int) -> None:
    x = vectors(1, 4 * BLOCK, 64)
    trellis, scalar = TrellisCodec(64, bits, of=of), Codec(64, bits)
    encoded = trellis.encode(x)
    assert encoded.nbytes == scalar.encode(x).nbytes
    loss, of_scalar = (float(mx.square(c.decode(c.encode(x)) - x).mean()) for c in (trellis, scalar))
    assert loss < {4: 0.68, 3: 0.65, 2: 0.69}[bits] * of_scalar


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_keys_lose_less_in_the_metric_of_the_queries(bits: int) -> None:
    x, metric = vectors(1, BLOCK, 64), metric_of(1, 64)
    losses = []
    for codec in (TrellisCodec(64, bits), Codec(64, bits)):
        error = np.array(codec.decode(codec.encode(x, None, codec.rounding_metric(metric))) - x)
        losses.append(np.einsum("hti,hij,htj->", error, metric, error))
    assert losses[0] < {4: 0.8, 3: 0.75, 2: 0.77}[bits] * losses[1]


@pytest.mark.parametrize("of", ["keys", "values"])
def test_a_block_gets_the_same_bits_alone_and_among_others(of: Of) -> None:
    codec, x = TrellisCodec(32, 2, of=of), vectors(2, 2 * BLOCK, 32)
    weights = mx.random.uniform(0.5, 2, (2, 2 * BLOCK))
    metric = codec.rounding_metric(metric_of(2, 32)) if of == "keys" else None
    whole = codec.encode(x, None, metric, weights)
    for i in range(2):
        some = slice(i * BLOCK, (i + 1) * BLOCK)
        alone = codec.encode(x[:, some], None, metric, weights[:, some])
        assert mx.array_equal(alone.codes, whole.codes[:, some])
        assert mx.array_equal(alone.scales, whole.scales[:, some])


def test_tokens_of_more_weight_lose_less() -> None:
    codec, x = TrellisCodec(32, 2, of="values"), vectors(4, BLOCK, 32)
    heavy = mx.where(mx.arange(BLOCK) % 4 == 0, 16.0, 1.0)
    off = mx.square(codec.decode(codec.encode(x, weights=mx.broadcast_to(heavy, (4, BLOCK)))) - x).mean(axis=(0, 2))
    assert float(off[::4].mean()) < 0.6 * float(off[1::4].mean())


def test_numbers_are_rounded_to_halves_as_numpy_rounds_them() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = np.sort(halves[np.isfinite(halves)])
    x = np.concatenate([halves, (halves[1:] + halves[:-1]) / 2, halves[1:-1] * np.float32(1 + 2**-12)])
    assert np.array_equal(_halves(x), x.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("last", [None, 9])
def test_the_search_finds_the_cheapest_string_of_its_rows(last: int | None) -> None:
    """Beside random strings that begin and end at the same node; the best of many is never better."""
    code, random = CODES[2][0], np.random.default_rng(5)
    target = random.normal(size=(1, 1, 64)).astype(np.float32)
    one = np.ones((1, 64), np.float32)
    former = None if last is None else np.full((1, 1, 64), last, np.uint16)
    states, levels = search(code, target, one, one, 64, former=former)
    end = int(states[0, 0, -1]) & 31
    assert last is None or end == last & 31
    found, best = float(np.square(levels - target).sum()), np.inf
    for _ in range(300):
        codes = states[0, 0].astype(np.int64) & 3
        codes[random.integers(0, 61, 3)] = random.integers(0, 4, 3)  # the last three codes are the node
        node, cost = end, 0.0
        for t, c in enumerate(codes):
            cost += float(code.table[node << 2 | c] - target[0, 0, t]) ** 2
            node = (node << 2 | int(c)) & 31
        if node == end and not np.array_equal(codes, states[0, 0] & 3):
            best = min(best, cost)
    assert found < best + 0.01


def test_numbers_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"128"):
        TrellisCodec(64, 4).encode(mx.zeros((1, 100, 64)))
    with pytest.raises(ValueError, match="no trellis code of 5 bits"):
        TrellisCodec(64, 5)
    with pytest.raises(ValueError, match="no trellis code of 4 bits"):
        TrellisCodec(80, 4)


# ---- layers


@pytest.mark.parametrize(
    ("bits", "tokens"),
    [
        *(((4, 3), tokens) for tokens in (1, 16, 100, 130, 144, 145, 200, 272, 400)),
        *(((2, 2), tokens) for tokens in (130, 272)),
        *(((8, 2), tokens) for tokens in (100, 145, 272)),  # keys have scalar codes
    ],
)
def test_a_layer_holds_every_token_once(bits: tuple[int, int], tokens: int) -> None:
    keys, values = vectors(2, tokens, 32) + 1, vectors(2, tokens, 32)
    layer = encode_layer(keys, values, CacheCodec(*bits, coding="trellis"))
    assert layer.tokens == tokens
    assert layer.keys.tokens % BLOCK == 0
    for exact, decoded, own in zip((keys, values), layer.decode(), bits, strict=True):
        error = float(mx.square(decoded - exact).sum() / mx.square(exact).sum())
        assert error < {2: 0.1, 3: 0.03, 4: 0.009, 8: 1e-4}[own]
    again = EncodedLayer.from_tensors(layer.tensors(), layer.codec)
    assert all(mx.array_equal(x, y) for x, y in zip(again.decode(), layer.decode(), strict=True))


def test_other_head_dims_and_more_bits_have_scalar_codes() -> None:
    codec = CacheCodec(4, 8, coding="trellis")
    assert isinstance(codec.keys(64), TrellisCodec)
    assert not isinstance(codec.values(64), TrellisCodec)
    assert not isinstance(codec.keys(80), TrellisCodec)
    assert not isinstance(codec.fine.keys(64), TrellisCodec)
    layer = encode_layer(vectors(2, 200, 80), vectors(2, 200, 80), codec)
    assert layer.tokens == 200


@pytest.mark.parametrize("attend", [cpu.attend_layer, reference.attend_layer])
def test_attention_over_a_layer_is_that_over_its_decoded_tokens(attend: Any) -> None:
    first = encode_layer(vectors(2, 300, 32) + 1, vectors(2, 300, 32), CacheCodec(3, 2, coding="trellis"))
    second = encode_layer(vectors(2, 200, 32), vectors(2, 200, 32), first.codec, parent=first)
    layer = EncodedLayer.join([first, second])
    queries = vectors(3, 4, 2, 32)
    keys, values = layer.decode()
    expected = reference.attend_dense(queries, *(mx.repeat(x[None], 3, axis=0) for x in (keys, values)), 0.2, None)
    found = attend(queries, layer, 0.2)
    assert np.allclose(found.output, expected.output, atol=2e-5)
    assert np.allclose(found.logsumexp, expected.logsumexp, atol=2e-5)


def test_finer_tokens_are_those_of_scalar_codes() -> None:
    """Coordinates of trellis codes are rounded in another order, and so is their metric."""
    codecs = [CacheCodec(2, 2, extra_bits=1.0, coding=coding) for coding in ("scalar", "trellis")]
    tokens = next(n for n in range(300, 500) if len({codec.fine_tokens(n, True) for codec in codecs}) == 1)
    queries = QueryCollector(tokens)
    queries.add(vectors(1, 4, tokens, 32) * mx.linspace(0.2, 3, 32), 2, 0, 0.2)
    scalar, trellis = (
        encode_layer(vectors(2, tokens, 32), vectors(2, tokens, 32), codec, queries.statistics()) for codec in codecs
    )
    assert trellis.keys.tokens >= BLOCK
    for name in ("fine_key_codes", "fine_key_scales", "fine_value_codes", "fine_value_scales", "key_mean"):
        assert mx.array_equal(trellis.tensors()[name], scalar.tensors()[name]), name


def test_a_layer_of_broken_blocks_is_refused() -> None:
    layer = encode_layer(vectors(1, 300, 32), vectors(1, 300, 32), CacheCodec(2, 2, coding="trellis"))
    short = {
        name: x[:, :100] if name in ("key_codes", "key_scales", "value_codes", "value_scales") else x
        for name, x in layer.tensors().items()
    }
    with pytest.raises(ValueError, match="100 tokens are not whole blocks of 128"):
        EncodedLayer.from_tensors(short, layer.codec)


# ---- settings


@pytest.mark.parametrize("known", [True, False])
def test_coarse_tokens_are_whole_blocks_and_bits_are_the_same_on_average(known: bool) -> None:
    trellis, scalar = (CacheCodec(4, 4, coding=coding) for coding in ("trellis", "scalar"))
    off = []
    for tokens in range(1, 6000, 7):
        window, attended = trellis.fine_tokens(tokens, known)
        assert min(window, attended) >= 0
        coarse = tokens - 16 - window - attended
        assert coarse <= 0 or coarse % BLOCK == 0
        off.append(window + attended - sum(scalar.fine_tokens(tokens, known)))
        assert -64 <= off[-1] < BLOCK
        if tokens > 1300:
            assert off[-1] <= 64
    assert abs(np.mean(off[300:])) < 8


def test_the_coding_is_a_part_of_the_identity_of_trellis_codes_alone() -> None:
    trellis, scalar = (CacheCodec(coding=coding).identity for coding in ("trellis", "scalar"))
    assert trellis.startswith(scalar)
    assert "trellis" not in scalar
    assert trellis.endswith("coding=trellis-f5c6940d")  # of the levels: other levels need a new digest


def test_a_codec_that_was_written_before_there_were_codings_is_scalar() -> None:
    content = json.loads(dump_codec(CacheCodec(3, 4)))
    del content["coding"]
    assert parse_codec(content) == CacheCodec(3, 4)
    trellis = CacheCodec(3, 4, coding="trellis")
    assert parse_codec(json.loads(dump_codec(trellis))) == trellis
    with pytest.raises(ValueError, match="coding is scalar or trellis"):
        parse_codec({**content, "coding": "huffman"})


def test_a_cache_that_compresses_itself_has_scalar_codes() -> None:
    with pytest.raises(ValueError, match="scalar codes"):
        TurboQuantKVCache(CacheCodec(coding="trellis"))
