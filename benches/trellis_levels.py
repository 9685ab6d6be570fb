"""Train the levels of trellis codes on normal numbers, as they are written in turboquant/quant/trellis.py.

    python -m benches.trellis_levels --strings 2048 --iterations 60

Training starts with equally likely levels, the smallest ones in row 0, and so on. Then each level becomes the mean of
the numbers that were coded by it, again and again (after Lloyd, 1982). It runs on a CPU, for some minutes. Printed are
the levels of each code, and the mean squared error of other normal numbers in strings of 128 and of 64.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from turboquant.quant.trellis import BLOCK, CODES
from turboquant.quant.viterbi import TrellisCode, search


def trained(bits: int, parities: tuple[int, ...], strings: int, iterations: int) -> TrellisCode:
    """Return a code whose levels were trained on ``strings`` strings at a time."""
    random, shape = np.random.default_rng([bits, 5 + bits]), (1 << bits, 1 << len(parities))
    levels = np.quantile(random.normal(size=1 << 18), (np.arange(shape[0] * shape[1]) + 0.5) / (shape[0] * shape[1]))
    for _ in range(iterations):
        code = _code(bits, levels.reshape(shape), parities)
        which = _levels_of_states(code)
        numbers = random.normal(size=(strings, BLOCK)).astype(np.float32)
        chosen = which[_encoded(code, numbers, BLOCK)[0]].reshape(-1)
        counts = np.bincount(chosen, minlength=levels.size)
        sums = np.bincount(chosen, numbers.reshape(-1), minlength=levels.size)
        levels = np.where(counts > 0, sums / np.maximum(counts, 1), levels)
    return _code(bits, levels.reshape(shape), parities)


def error(code: TrellisCode, length: int, strings: int = 300) -> float:
    """Return the mean squared error of normal numbers in strings of ``length``."""
    numbers = np.random.default_rng(9).normal(size=(strings, BLOCK)).astype(np.float32)
    return float(np.square(_encoded(code, numbers, length)[1] - numbers).mean())


def _code(bits: int, levels: NDArray[np.float64], parities: tuple[int, ...]) -> TrellisCode:
    return TrellisCode(bits, levels.astype(np.float16).astype(np.float32), parities)


def _levels_of_states(code: TrellisCode) -> NDArray[np.int64]:
    """Return which level each state has, row by row."""
    numbered = np.arange(code.levels.size, dtype=np.float32).reshape(code.levels.shape)
    return TrellisCode(code.bits, numbered, code.parities).table.astype(np.int64)


def _encoded(
    code: TrellisCode, numbers: NDArray[np.float32], length: int
) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    one = np.ones_like(numbers)
    states, levels = search(code, numbers[:, None], one, one, length)
    return states[:, 0], levels[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=2048)
    parser.add_argument("--iterations", type=int, default=60)
    arguments = parser.parse_args()
    kinds = dict.fromkeys((code.bits, code.parities) for pair in CODES.values() for code in pair)
    for bits, parities in kinds:
        code = trained(bits, parities, arguments.strings, arguments.iterations)
        print(f"{bits} bits, parities {parities}: error {error(code, BLOCK):.5f}, {error(code, BLOCK // 2):.5f}")
        print(" ".join(f"{level:.4g}" for level in code.levels.reshape(-1)), flush=True)


if __name__ == "__main__":
    main()
