"""Packing loses nothing, wastes no bit, and keeps the layout that files have."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant.quant import SUPPORTED_BITS
from turboquant.quant.packing import pack, packed_words, unpack

# Code i is (7 i + 3) mod 2**bits, i = 0 .. 19, so that planes are padded too.
GOLDEN = {
    2: [0x1B1B1B1B, 0x1B],
    3: [0x1B1B1B1B, 0x1B, 0xF0F0],
    4: [0x4D6F81A3, 0xC5E7092B, 0x81A3],
    5: [0x4D6F81A3, 0xC5E7092B, 0x81A3, 0x3399C],
    6: [0x4D6F81A3, 0xC5E7092B, 0x81A3, 0xA543E950, 0xF],
    8: [0x18110A03, 0x342D261F, 0x5049423B, 0x6C655E57, 0x88817A73],
}


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_the_layout_is_the_one_of_files(bits: int) -> None:
    codes = mx.array([(7 * i + 3) % 2**bits for i in range(20)])
    assert pack(codes, bits).tolist() == GOLDEN[bits]
    assert unpack(mx.array(GOLDEN[bits], dtype=mx.uint32), bits, 20).tolist() == codes.tolist()


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(SUPPORTED_BITS),
    dim=st.integers(1, 300),
    leading=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([mx.uint8, mx.uint16, mx.uint32]),
)
def test_unpacking_undoes_packing(bits: int, dim: int, leading: list[int], seed: int, dtype: mx.Dtype) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (*leading, dim))
    words = pack(mx.array(codes).astype(dtype), bits)
    assert words.dtype == mx.uint32
    assert words.shape == (*leading, packed_words(dim, bits))
    np.testing.assert_array_equal(np.array(unpack(words, bits, dim)), codes)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 160, 256])
def test_a_code_takes_its_bits_and_no_more(bits: int, dim: int) -> None:
    assert pack(mx.zeros((7, dim), mx.uint32), bits).nbytes == 7 * dim * bits // 8


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("code", ["lowest", "highest"])
def test_the_lowest_and_the_highest_codes_are_restored(bits: int, code: str) -> None:
    codes = mx.full((2, 80), 0 if code == "lowest" else 2**bits - 1, dtype=mx.uint32)
    assert mx.array_equal(unpack(pack(codes, bits), bits, 80), codes)
