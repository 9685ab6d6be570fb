"""benches/trellis_attention.py: the kernels that read trellis codes, compiled as C++, compute attention."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benches import trellis_attention as bench
from benches.viterbi import SMALL, TrellisCode, trained_code
from tests.turboquant.kernels.emulator import EMULATOR, ENDED
from turboquant.kernels.kernel_text import defines, text

EMULATED = """
typedef unsigned short u16;
#undef READ_8
#define READ_8(from, to) memcpy(to, from, 8);
#define SHIFTED_IN(before, word) ((word) << 10 | (before) >> 22)
#define SHIFTED_OUT(word, next) ((word) >> 9 | (next) << 23)
#define PLACE(rows, others, i) (((others) & 0xff) | ((rows) >> (8 * (i)) & 0xff) << 8 | ((others) & 0xff0000))
#define NEXT_PLACE(rows, others, i) PLACE(rows, (others) >> 8, i)
#define LEVELS_AT(place) shared[(place) / 4]
#define GROUP_BARRIER(group) BARRIER
static u32 word_of_lane(u32 x, int lane) {
    float y;
    memcpy(&y, &x, 4);
    y = of_lane(y, lane);
    memcpy(&x, &y, 4);
    return x;
}
"""
EMULATED_OF_MANY = """
static void multiply_pairs(float (&sums)[DIM / 2], const u32 (&left)[4], const u32* tile, int k) {
    group_multiply(sums, left, true, [&](int i, int n) {
        return half_of(tile[((2 * k + i / 8) * (DIM / 8) + n / 8) * BLOCK_WORDS + n % 8 * 4 + i % 8 / 2], i % 2);
    });
}
"""


def small_pair() -> tuple[TrellisCode, TrellisCode]:
    first, second = (trained_code(4, 9, (1 << tap,), strings=32, iterations=2) for tap in bench.TAPS)
    return first, second


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_small_code_has_32_levels_of_rows_and_parities(bits: int) -> None:
    log_states, masks = SMALL[bits]
    code = trained_code(bits, log_states, masks, strings=32, iterations=2)
    states = np.arange(1 << log_states)
    node = states >> bits
    row = states & ((1 << bits) - 1) ^ node >> (code.node_bits - bits)
    place = [sum((int(n & mask).bit_count() & 1) << i for i, mask in enumerate(masks)) for n in node]
    levels: dict[tuple[int, int], set[float]] = {}
    for r, p, level in zip(row, place, code.table, strict=True):
        levels.setdefault((int(r), p), set()).add(float(level))
    assert len(levels) == 32
    assert all(len(found) == 1 for found in levels.values())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("many", [False, True])
def test_kernels_attend_to_what_the_codes_mean(many: bool, tmp_path: Path) -> None:
    """One row, and 11 rows of 44 queries of each KV head; keys and values with and without a mean."""
    random = np.random.default_rng(0)
    heads, n_heads, tokens, rows, splits = (2, 8, 512, 11, 4) if many else (2, 8, 384, 1, 2)
    keys, values = random.integers(0, 16, (2, heads, tokens, bench.DIM))
    scales = random.uniform(0.02, 0.2, (2, heads, tokens)) * random.choice([-1, 1], (2, heads, tokens))
    key_scales, value_scales = scales.astype(np.float16)
    queries = random.normal(size=(rows, n_heads, 1, bench.DIM)).astype(np.float16)
    means = random.normal(size=(2, heads, bench.DIM)).astype(np.float32)
    signs, factor = random.choice([-1.0, 1.0], bench.DIM), 3.0
    constants = np.r_[means.ravel(), signs, np.zeros(4 * 256), np.full(heads, factor)].astype(np.float32)
    plan = bench.plan_of(rows, n_heads, heads, tokens, splits, 0.125)
    partials = np.full((heads, splits, rows * n_heads // heads, bench.DIM + 4), np.nan, np.float32)
    packed, table = (bench.pack_keys(keys), bench.pack_values(values)), bench.table_of(small_pair())
    given = queries, packed[0], key_scales, packed[1], value_scales, table, constants, plan, partials
    groups, threads = splits // (2 if many else 1), bench.constants(many)["THREADS"]
    emulated(tmp_path, many, groups, heads, threads, given)

    for head in range(heads):
        own = queries[:, head * 4 : head * 4 + 4].reshape(-1, bench.DIM).astype(np.float64)
        rotated = hadamard(bench.DIM) @ (own * signs).T / bench.DIM**0.5
        scores = bench.key_levels(keys, small_pair())[head] @ rotated * np.abs(key_scales[head, :, None])
        scores = 0.125 * (scores + np.where(key_scales[head] > 0, 1, 0)[:, None] * (own @ means[0, head]))
        weights = np.exp(scores - scores.max(axis=0))
        weights /= weights.sum(axis=0)
        levels = bench.value_levels(values, small_pair())[head] * np.abs(value_scales[head, :, None]) * factor
        highest, total, of_mean = (partials[head, :, :, bench.DIM + i] for i in range(3))
        share = 2.0 ** (highest - highest.max(axis=0))
        output = (partials[head, :, :, : bench.DIM] * share[..., None]).sum(axis=0) / (total * share).sum(axis=0)[
            :, None
        ]
        np.testing.assert_allclose(output, weights.T @ levels, atol=1e-3)
        mean_share = (of_mean * share).sum(axis=0) / (total * share).sum(axis=0)
        np.testing.assert_allclose(mean_share, (weights * (value_scales[head, :, None] > 0)).sum(axis=0), atol=1e-3)


def hadamard(size: int) -> NDArray[np.float64]:
    found = np.ones((1, 1))
    while len(found) < size:
        found = np.block([[found, found], [found, -found]])
    return found


def emulated(folder: Path, many: bool, groups: int, heads: int, threads: int, given: tuple[NDArray[Any], ...]) -> None:
    """Run a kernel on the emulator; the last array is written."""
    pointers = bench.types()
    source = defines(tuple(bench.constants(many).items())) + EMULATOR
    source += "".join(text(name) for name in ("layout.h", "codes.h", "many.h") if many or name != "many.h")
    source += EMULATED + (EMULATED_OF_MANY if many else "")
    source += "".join(f"static {kind} {name};\n" for name, kind in pointers.items())
    source += "static void body() {\n" + bench.body(many) + "}\n"
    source += 'extern "C" int run(int groups, int heads, int threads, void** arrays) {\n'
    source += "".join(f"{name} = ({kind})arrays[{i}];\n" for i, (name, kind) in enumerate(pointers.items()))
    source += "return run_groups(groups, heads, 1, threads);\n}\n"
    (folder / "attention.cpp").write_text(source)
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing", "-o", "attention.so"]
    subprocess.run([*command, "attention.cpp"], cwd=folder, check=True)
    arrays = [np.ascontiguousarray(x) for x in given]
    assert arrays[-1] is given[-1]
    places = (ctypes.c_void_p * len(arrays))(*(x.ctypes.data for x in arrays))
    assert ctypes.CDLL(str(folder / "attention.so")).run(groups, heads, threads, places) == ENDED
