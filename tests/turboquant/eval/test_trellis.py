"""benches/viterbi.py and trellis.py: strings are read by shifts and look-ups, and lose less than scalar codes."""

from __future__ import annotations

import ctypes
import functools
import itertools
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benches import trellis, viterbi
from benches.trellis import Trellis, trellis_baselines
from benches.viterbi import TrellisCode, trained_code
from tests.turboquant.kernels.emulator import EMULATOR, ENDED
from turboquant import CacheCodec
from turboquant.eval.baselines import exact
from turboquant.eval.divergence import measure
from turboquant.eval.results import Sample
from turboquant.kernels.kernel_text import defines
from turboquant.quant import rounding
from turboquant.quant.codebook import lloyd_max
from turboquant.quant.rounding import RoundingMetric


def numbers(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


@functools.cache
def small_code(bits: int, log_states: int) -> TrellisCode:
    return trained_code(bits, log_states, strings=32, iterations=4)


def cost_of(levels: NDArray[np.float32], string: tuple[NDArray[np.float32], ...]) -> NDArray[np.float32]:
    target, gain, root = string
    return np.asarray(((root * (gain * levels - target)) ** 2).sum(axis=-1))


def weighted(heads: int, tokens: int) -> tuple[NDArray[np.float32], ...]:
    random = np.random.default_rng(2)
    others = [random.uniform(0.5, 1.5, (heads, tokens)).astype(np.float32) for _ in range(2)]
    return numbers(heads, tokens), *others


def found_levels(code: TrellisCode, string: tuple[NDArray[np.float32], ...]) -> NDArray[np.float32]:
    target, gain, root = string
    levels: NDArray[np.float32] = code.encode(np, target[:, None], gain, root)[1][:, 0]
    return levels


@pytest.mark.parametrize(("bits", "log_states"), [(2, 5), (3, 6), (3, 7), (4, 8)])
def test_codes_alone_give_the_levels(bits: int, log_states: int) -> None:
    code, (target, gain, root) = small_code(bits, log_states), weighted(3, 300)
    states, levels = (found[:, 0] for found in code.encode(np, target[:, None], gain, root))
    own = states.astype(int) & ((1 << bits) - 1)
    for string in viterbi.cuts(300):
        window = sum(np.roll(own[:, string], back, axis=1) << (bits * back) for back in range(4))
        assert np.array_equal(code.table[window & ((1 << log_states) - 1)], levels[:, string])


@pytest.mark.parametrize(("bits", "log_states"), [(2, 5), (3, 8), (4, 9)])
def test_each_node_is_entered_by_one_branch_of_each_row_and_rows_are_in_the_order_of_their_levels(
    bits: int, log_states: int
) -> None:
    states = viterbi.states_of_rows(bits, log_states - bits)
    entered = states & ((1 << (log_states - bits)) - 1)
    assert all(sorted(row) == list(range(1 << (log_states - bits))) for row in entered.T)
    levels = small_code(bits, log_states).table[states]
    assert (np.diff(levels.mean(axis=0)) > 0).all()


def test_a_search_of_all_rows_finds_the_best_string_that_bites_its_tail_where_it_must() -> None:
    code, (target, gain, root) = replace(small_code(2, 5), rows=4), weighted(20, 6)
    every = np.array(list(itertools.product(range(4), repeat=6)))
    states = ((np.roll(every, 2, axis=1) << 4) | (np.roll(every, 1, axis=1) << 2) | every) & 31
    former = np.random.default_rng(0).integers(0, 32, (20, 1, 6)).astype(np.uint16)
    _, levels = code.encode(np, target[:, None], gain, root, former=former)
    for number in range(20):
        string = target[number], gain[number], root[number]
        others = states[(states[:, -1] & 7) == (former[number, 0, -1] & 7)]
        best = cost_of(code.table[others], string).min()
        assert best * 0.999 <= cost_of(levels[number, 0], string) <= best * 1.01  # costs of the search are halves


@pytest.mark.parametrize("bits", [2, 3])
def test_two_rows_are_nearly_as_good_as_all(bits: int) -> None:
    two, x = trained_code(bits, 6, strings=64, iterations=10), numbers(40, viterbi.LENGTH)
    one = np.ones_like(x)
    every = TrellisCode(bits, two.table, rows=1 << bits)
    errors = [cost_of(found_levels(code, (x, one, one)), (x, one, one)).sum() for code in (two, every)]
    assert errors[1] < errors[0] < 1.05 * errors[1]


def test_a_trained_table_loses_a_fifth_less_than_levels_for_each_number() -> None:
    x = numbers(40, viterbi.LENGTH)
    nearest = np.abs(x[..., None] - lloyd_max(2).levels).argmin(axis=-1)
    scalar = np.square(lloyd_max(2).levels[nearest] - x).mean()
    _, levels = viterbi.encode_alone(trained_code(2, 6, strings=64, iterations=10), x)
    assert np.square(levels - x).mean() < 0.8 * scalar


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("bits", "log_states"), [(2, 8), (3, 8), (4, 8), (4, 9)])
@pytest.mark.parametrize("down", [False, True])
def test_the_kernel_finds_what_numpy_finds(bits: int, log_states: int, down: bool, tmp_path: Path) -> None:
    """Its text is compiled as C++. Errors move other coordinates' targets, and a second search follows a first."""
    code, (_, gain, root) = small_code(bits, log_states), weighted(2, 301)
    exact, before = numbers(2, 2, 3, 301)
    others = 0.2 * numbers(2, 3, 3), exact, 0.1 * before
    former = None
    for number, target in enumerate((exact, exact + 0.1 * before)):
        expected, levels = code.encode(np, target, gain, root, others, down, former)
        (tmp_path / str(number)).mkdir()
        found = emulated_search(tmp_path / str(number), code, target, gain, root, others, down, former)
        assert np.array_equal(found[0], expected)
        assert np.array_equal(found[1], levels)
        former = expected


KINDS = {"within": "u32", "former": "u16", "level_pairs": "u32", "masks": "u32", "row_of_bin": "u8", "sizes": "int"}


def emulated_search(
    folder: Path, code: TrellisCode, target: Any, gain: Any, root: Any, others: Any, down: bool, former: Any
) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Do on the emulator what ``TrellisCode.encode`` does on a GPU."""
    heads, block, tokens = target.shape
    strings = len(viterbi.cuts(tokens))
    sizes = np.array([tokens, strings, down], np.int32)
    pairs = np.repeat(others[0].astype(np.float16), 2, axis=-1).view(np.uint32)
    given = (
        target,
        gain,
        root,
        pairs,
        *others[1:],
        sizes if former is None else former,
        *viterbi.laid_out(code),
        sizes,
    )
    found = np.empty(target.shape, np.uint16), np.empty(target.shape, np.float32)
    pointers = [f"{KINDS.get(name, 'float')}* {name}" for name in viterbi.INPUTS] + [
        "u16* chosen",
        "float* chosen_levels",
    ]
    source = defines(tuple(viterbi.defined(code, block, True, former is not None).items())) + EMULATOR + PAIRS_OF_HALVES
    source += "".join(f"static {pointer};\n" for pointer in pointers)
    source += "static void body() {\n" + viterbi.KERNEL.read_text() + "}\n"
    source += 'extern "C" int run(int groups, int heads, void** arrays) {\n'
    for number, (kind, name) in enumerate(pointer.split() for pointer in pointers):
        source += f"{name} = ({kind})arrays[{number}];\n"
    source += "return run_groups(groups, heads, 1, 32);\n}\n"
    (folder / "search.cpp").write_text(source)
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", "search.so", "search.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    arrays = [np.ascontiguousarray(x) for x in given] + list(found)
    places = (ctypes.c_void_p * len(arrays))(*(x.ctypes.data for x in arrays))
    groups = -(-strings // (64 >> code.node_bits))
    assert ctypes.CDLL(str(folder / "search.so")).run(groups, heads, places) == ENDED
    return found


PAIRS_OF_HALVES = """
#define LANES_MEET wait_for_lanes()
#define WRITE_8(to, low, high) { (to)[0] = (low); (to)[1] = (high); }
template <typename F>
static u32 of_pair(u32 a, u32 b, u32 c, F f) {
    return pack_halves(f(half_of(a, 0), half_of(b, 0), half_of(c, 0)), f(half_of(a, 1), half_of(b, 1), half_of(c, 1)));
}
static u32 pair_multiply_add(u32 a, u32 b, u32 c) {
    return of_pair(a, b, c, [](float x, float y, float z) { return x * y + z; });
}
static u32 pair_subtract(u32 a, u32 b) { return of_pair(a, b, 0, [](float x, float y, float) { return x - y; }); }
static u32 pair_min(u32 a, u32 b) { return of_pair(a, b, 0, [](float x, float y, float) { return x < y ? x : y; }); }
static u32 pair_less(u32 a, u32 b) {
    return (half_of(a, 0) < half_of(b, 0) ? 0xffffu : 0) | (half_of(a, 1) < half_of(b, 1) ? 0xffff0000u : 0);
}
static u32 low_twice(u32 x) { return (x & 0xffffu) * 0x10001u; }
static u32 high_twice(u32 x) { return low_twice(x >> 16); }
static u32 rotated(u32 x, u32 by) { return (by & 31) ? x << (by & 31) | x >> (32 - (by & 31)) : x; }
template <typename T>
static T lane_xor(T x, int mask) {
    memcpy(&boxes[current].left, &x, 4);
    wait_for_lanes();
    T other;
    memcpy(&other, &boxes[current % 32 ^ (mask & 31)].left, 4);
    wait_for_lanes();
    return other;
}
"""


@pytest.mark.parametrize("feedback", [True, False])
def test_errors_in_the_metric_are_smaller_than_those_of_scalar_codes(feedback: bool) -> None:
    heads, dim, tokens, bits = 2, 16, 256, 2
    unit = numbers(heads, dim, tokens)
    looks = np.random.default_rng(0).normal(size=(heads, dim, dim)) * np.exp(numbers(heads, 1, dim))
    metric = RoundingMetric.prepare(np, looks @ looks.swapaxes(1, 2))

    def error(levels: Any, factor: Any) -> float:
        off = factor[:, None] * levels - unit
        return float((off * (metric.damped @ off)).sum())

    codes, factor = rounding.round_in_metric(np, unit, metric, bits)
    code = trained_code(bits, 6, strings=64, iterations=10)
    settings = Trellis(code, code, feedback=feedback)
    found = trellis.round_in_metric(np, code, unit, metric, np.ones((heads, tokens), np.float32), settings)
    assert error(*found) < 0.85 * error(lloyd_max(bits).levels[codes], factor)


def test_a_contender_has_the_bytes_of_the_codec_and_moves_the_model_less(
    build_model: Callable[[str], Any], random_tokens: Callable[[int, int], list[int]]
) -> None:
    codec, code = CacheCodec(2, 2), trained_code(2, 5, strings=64, iterations=10)
    samples = [Sample(tuple(random_tokens(200, 1)), (tuple(random_tokens(40, 9)),))]
    rows = {
        "plain": Trellis(code, code, sweeps=0),
        "weighted": Trellis(code, code, projected=True, attention_power=0.25, length_power=1.0, sweeps=1),
        "values alone": Trellis(None, code),
    }
    scalar, *found = measure(build_model("llama"), samples, [exact(codec), *trellis_baselines(codec, rows)])
    assert [row.cache for row in found] == list(rows)
    for row in found:
        assert row.effective_bits == scalar.effective_bits
    assert found[0].kl < scalar.kl
