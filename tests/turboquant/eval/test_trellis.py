"""benches/viterbi.py and trellis.py: strings are read by shifts and look-ups, and lose less than scalar codes."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benches import trellis, viterbi
from benches.trellis import Trellis, trellis_baselines
from benches.viterbi import TrellisCode, trained_code
from turboquant import CacheCodec
from turboquant.eval.baselines import exact
from turboquant.eval.divergence import measure
from turboquant.eval.results import Sample
from turboquant.quant import rounding
from turboquant.quant.codebook import lloyd_max
from turboquant.quant.rounding import RoundingMetric


def numbers(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def random_code(bits: int, log_states: int) -> TrellisCode:
    return TrellisCode(bits, np.random.default_rng(1).normal(size=1 << log_states).astype(np.float32))


def cost_of(levels: NDArray[np.float32], string: tuple[NDArray[np.float32], ...]) -> NDArray[np.float32]:
    target, gain, weight = string
    return np.asarray((weight * (gain * levels - target) ** 2).sum(axis=-1))


def weighted(rows: int, tokens: int) -> tuple[NDArray[np.float32], ...]:
    random = np.random.default_rng(2)
    others = [random.uniform(0.2, 2, (rows, tokens)).astype(np.float32) for _ in range(2)]
    return numbers(rows, tokens), *others


@pytest.mark.parametrize(("bits", "log_states"), [(2, 5), (3, 4), (3, 7), (4, 8)])
def test_codes_alone_give_the_levels(bits: int, log_states: int) -> None:
    code = random_code(bits, log_states)
    states, levels = code.encode(np, *weighted(3, 300))
    own = states.astype(int) & ((1 << bits) - 1)
    for string in viterbi.cuts(300):
        window = sum(np.roll(own[:, string], back, axis=1) << (bits * back) for back in range(4))
        assert np.array_equal(code.table[window & ((1 << log_states) - 1)], levels[:, string])


def test_no_other_string_is_better() -> None:
    code, string = random_code(2, 4), weighted(20, 6)
    every = np.array(list(itertools.product(range(4), repeat=6)))
    levels = code.table[(np.roll(every, 1, axis=1) << 2) | every]
    best = np.stack([cost_of(levels, tuple(x[row] for x in string)).min() for row in range(20)])
    found = cost_of(code.encode(np, *string)[1], string)
    assert (found >= best * 0.9999).all()
    assert (found < best * 1.0001).mean() > 0.7  # of so short strings, the state at the end is a good guess only
    assert found.sum() < 1.1 * best.sum()


def test_a_trained_table_loses_a_fifth_less_than_levels_for_each_number() -> None:
    x = numbers(40, viterbi.LENGTH)
    nearest = np.abs(x[..., None] - lloyd_max(2).levels).argmin(axis=-1)
    scalar = np.square(lloyd_max(2).levels[nearest] - x).mean()
    _, levels = viterbi.encode_alone(trained_code(2, 6, strings=64, iterations=10), x)
    assert np.square(levels - x).mean() < 0.8 * scalar


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("bits", "log_states"), [(2, 8), (3, 9), (4, 8)])
def test_the_kernel_finds_what_numpy_finds(bits: int, log_states: int, tmp_path: Path) -> None:
    """Its text is compiled as C++, for one thread."""
    names = ("target", "gain", "weight", "table", "sizes", "chosen", "chosen_levels", "memory")
    kinds = ("float", "float", "float", "float", "int", "unsigned short", "float", "float")
    listed = ", ".join(f"{kind}* {name}" for kind, name in zip(kinds, names, strict=True))
    body = viterbi.SOURCE.replace("extern __shared__ float memory[];", "").replace("__syncthreads();", "")
    text = f"struct Index {{ int x; }};\n#define LENGTH {viterbi.LENGTH}\n#define THREADS 1\n"
    text += f'extern "C" void search(int block, {listed}) {{ Index blockIdx{{block}}, threadIdx{{0}};\n{body} }}'
    (tmp_path / "search.cpp").write_text(text)
    subprocess.run(
        ["g++", "-O1", "-shared", "-fPIC", "-o", tmp_path / "search.so", tmp_path / "search.cpp"], check=True
    )
    code, string = random_code(bits, log_states), weighted(3, 301)
    sizes = np.array([301, len(viterbi.cuts(301)), bits, code.table.size], np.int32)
    chosen, levels, memory = np.empty((3, 301), np.uint16), np.empty((3, 301), np.float32), np.empty(1 << 16, "f")
    arrays = [*string, code.table, sizes, chosen, levels, memory]
    search = ctypes.CDLL(str(tmp_path / "search.so")).search
    for block in range(3 * int(sizes[1])):
        search(block, *(x.ctypes.data_as(ctypes.c_void_p) for x in arrays))
    expected_states, expected_levels = code.encode(np, *string)
    assert np.array_equal(chosen, expected_states)
    assert np.array_equal(levels, expected_levels)


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
        "plain": Trellis(code, code),
        "weighted": Trellis(code, code, projected=True, attention_power=0.25, length_power=1.0),
        "keys alone": Trellis(code, None),
    }
    scalar, *found = measure(build_model("llama"), samples, [exact(codec), *trellis_baselines(codec, rows)])
    assert [row.cache for row in found] == list(rows)
    for row in found:
        assert row.effective_bits == scalar.effective_bits
    assert found[0].kl < scalar.kl
