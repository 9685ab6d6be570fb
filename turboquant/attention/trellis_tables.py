"""Tables of pairs of levels, by which GPU kernels decode trellis codes of two strings at a time.

A level is that of a row and of a few parities (quant/viterbi.py): of five sums, modulo 2, of its string's last bits.
Kernels compute five other sums, which decide as much. They are chosen so that all ten of a pair lie side by side after
few operations on whole words of codes (``kernels/text/trellis.h``). The pair's entry is at the number that they make.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from turboquant.quant.trellis import CODES
from turboquant.quant.viterbi import NODE_BITS

PAIRS = 1 << 10  # entries of a table
Sum = tuple[int, ...]  # bits of a string, by their distance from the code's first bit

_OTHERS: dict[int, tuple[Sum, ...]] = {3: ((0, 1), (-1,)), 2: ((-1, -3), (-2,), (1, 0, -1))}


def sums_of(bits: int) -> list[tuple[int, Sum]]:
    """Return the sum that each bit of an index is, the lowest first: which string of a pair, and which of its bits."""
    rows: list[Sum] = [(k, k - NODE_BITS) for k in range(bits)]
    if bits == 4:
        return [(0, (-5,)), *((string, row) for row in rows for string in (0, 1)), (1, (-1,))]
    return [(string, each) for each in (*rows, *_OTHERS[bits]) for string in (0, 1)]


@functools.cache
def pairs_of_levels(bits: int) -> NDArray[np.uint32]:
    """Return a table of pairs of levels as halves, (PAIRS,): the first string's is the lower half."""
    pairs, index = np.empty((PAIRS, 2), np.float16), np.arange(PAIRS)
    for string, code in enumerate(CODES[bits]):
        states = np.arange(1 << code.log_states)
        places, own = np.zeros_like(states), 0
        for i, (of, bits_of_sum) in enumerate(sums_of(bits)):
            if of == string:
                own |= 1 << i
                for k in bits_of_sum:
                    places ^= (states >> (bits - 1 - k) & 1) << i
        levels = np.empty(PAIRS, np.float16)
        levels[places] = code.table
        pairs[:, string] = levels[index & own]
    return pairs.view(np.uint32)[:, 0]
