"""Trellis codes: bit strings whose levels depend on more bits than a number's own, and the search for a good string.

The level of a number is the table's entry at the last ``log_states`` bits of its string up to this number, of which
``bits`` are its own code. So each code serves several numbers. A string bites its own tail: the bits before its first
number are those of its last ones, so nothing beside the codes is stored.

The bits before a number are a node, and a branch leads from it for each code. The branches of a node are in the order
of their levels: row r of a node is its branch with the code ``r ^ its first bits``, and all levels of row r are smaller
than those of row r + 1. So each node is entered by one branch of each row. The search only follows branches of the
two rows that are nearest to a number: two branches enter a node, where a full search compares 2**bits. It computes in
halves, which are float16 numbers. kernels/trellis_search.py does the same on a GPU.

A few bits of the level, parities of the node's bits, choose among the levels of a row, so that a decoder's table is
small. This is a convolutional code, as in trellis-coded quantisation.

Sources: the bitshift trellis and its approximate tail-biting, Tseng et al., "QTIP" (arXiv 2406.11235); a few bits that
choose among levels, Marcellin and Fischer, "Trellis coded quantization" (1990); the search, Viterbi (1967).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

NODE_BITS = 5
WINDOW = 16  # numbers before and after a string's end that decide where it bites its tail
BINS, REACH = 256, 4.0  # numbers are looked up in BINS bins over -REACH .. REACH, for the nearest rows
FAR = 20000  # cost of nodes that a string does not begin at
RENEWED = 16  # numbers after which the least cost is subtracted, so that halves stay precise
ROWS = 2  # that are searched
AT_ONCE = 32  # strings that are searched together, so that a processor's cache holds what is computed of them


@dataclass(frozen=True, eq=False)
class TrellisCode:
    """A trellis code with ``bits`` bits for each number, 2 to 4, and ``NODE_BITS`` bits of a node.

    levels: (2**bits, 2**n) float32 that float16 holds exactly: those of each row, of which n parities choose one.
    parities: n masks of a node's bits. The parity of the bits in the first one is the highest bit of a column's number.
    """

    bits: int
    levels: NDArray[np.float32]
    parities: tuple[int, ...]

    @property
    def log_states(self) -> int:
        """The number of bits that decide a level."""
        return NODE_BITS + self.bits

    @functools.cached_property
    def table(self) -> NDArray[np.float32]:
        """The level of each state, (2**log_states,)."""
        states = np.arange(1 << self.log_states)
        node = states >> self.bits
        row = (states ^ (node >> (NODE_BITS - self.bits))) & ((1 << self.bits) - 1)
        column = np.zeros_like(states)
        for mask in self.parities:
            column = column << 1 | _parity(node & mask)
        table: NDArray[np.float32] = self.levels[row, column]
        return table

    @functools.cached_property
    def entered_by(self) -> NDArray[np.int64]:
        """The state by whose branch of a row a node is entered, (2**bits, nodes)."""
        node, row = np.arange(1 << NODE_BITS), np.arange(1 << self.bits)[:, None]
        code = node & ((1 << self.bits) - 1)
        before = (code ^ row) << (NODE_BITS - self.bits) | node >> self.bits
        return before << self.bits | code

    @functools.cached_property
    def row_of_bin(self) -> NDArray[np.uint8]:
        """The first of the rows to search, for each bin."""
        means = self.levels.mean(axis=1)
        centres = (np.arange(BINS) + 0.5) * (2 * REACH / BINS) - REACH
        middles = np.lib.stride_tricks.sliding_window_view(means, ROWS).mean(axis=1)
        return np.searchsorted((middles[1:] + middles[:-1]) / 2, centres).astype(np.uint8)


def _parity(x: NDArray[np.int64]) -> NDArray[np.int64]:
    for shift in (4, 2, 1):
        x = x ^ x >> shift
    return x & 1


def search(
    code: TrellisCode,
    target: Any,
    gain: Any,
    root: Any,
    length: int,
    others: Any = None,
    down: bool = False,
    former: Any | None = None,
) -> tuple[Any, Any]:
    """Find strings with a small sum of ``(root * (gain * level - target))**2``, one for each coordinate.

    target: (H, B, T) float32 of NumPy or MLX. gain, root: (H, T). Each coordinate's numbers are strings of ``length``
    numbers, at least ``WINDOW``, one after the other.
    others: for coordinates that are chosen one by one, three arrays: how far the error of each moves the targets of the
    others, (H, B, B); the exact numbers, (H, B, T); and their errors before. down: begin with the last coordinate.
    former: states of strings that were found for other targets; the new ones bite their tails at the same nodes.
    Returns the states (H, B, T) uint16, and their levels (H, B, T) float32, of the same module.
    """
    if isinstance(target, mx.array):
        target, gain, root = np.asarray(target), np.asarray(gain), np.asarray(root)
        others = None if others is None else [np.asarray(x) for x in others]
        found = search(code, target, gain, root, length, others, down, None if former is None else np.asarray(former))
        return mx.array(found[0]), mx.array(found[1])
    heads, block, tokens = target.shape
    states, changes = np.empty(target.shape, np.uint16), np.zeros(target.shape, np.float32)
    order = range(block)[:: -1 if down else 1]
    gain_of_strings, root_of_strings = gain.reshape(-1, length), root.reshape(-1, length)
    for done, i in enumerate(order):
        moved = np.zeros((heads, tokens), np.float32)
        for j in order[:done] if others is not None else ():
            moved = _halves(_halves(others[0][:, i, j, None]) * changes[:, j] + moved)
        strings = (target[:, i] - moved).reshape(-1, length), gain_of_strings, root_of_strings
        last = _around_ends(code, *strings) if former is None else former[:, i].reshape(-1, length)[:, -1]
        states[:, i] = _search(code, last, 0, *strings).reshape(heads, tokens)
        if others is not None:
            changes[:, i] = _halves(gain * code.table[states[:, i]] - others[1][:, i] - others[2][:, i])
    return states, code.table[states]


def _around_ends(code: TrellisCode, *strings: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the best last states of strings, from the numbers around their ends."""
    around = np.r_[-WINDOW:WINDOW]
    return _search(code, None, WINDOW, *(x[:, around] for x in strings))[:, WINDOW - 1]


def _search(
    code: TrellisCode,
    last: NDArray[np.uint16] | None,
    free: int,
    target: NDArray[np.float32],
    gain: NDArray[np.float32],
    root: NDArray[np.float32],
) -> NDArray[np.uint16]:
    """Return the cheapest states (R, T) of strings (R, T).

    last: the last state of each, (R,), or None for any. free: how many numbers come before the string's first one.
    root: roots of the weights.
    """
    (rows, tokens), nodes = target.shape, 1 << NODE_BITS
    if rows > AT_ONCE:
        parts = (slice(start, start + AT_ONCE) for start in range(0, rows, AT_ONCE))
        found = [
            _search(code, None if last is None else last[part], free, target[part], gain[part], root[part])
            for part in parts
        ]
        return np.concatenate(found)
    every = np.arange(rows)
    ends = None if last is None else last.astype(np.int64) & (nodes - 1)
    offset = np.clip(target * (np.float32(BINS / (2 * REACH)) / gain) + BINS // 2, 0, BINS - 1)
    first = code.row_of_bin[offset.astype(np.int64)].T.astype(np.int64)  # (T, R)
    scale, shift = (_halves(x).T[:, None, :, None] for x in (gain * root, -target * root))
    cost = np.full((rows, nodes), 0 if ends is None else FAR, np.float32)
    if ends is not None:
        cost[every, ends] = 0
    second = np.empty((tokens, rows, nodes), bool)  # whether a node is entered by the second branch
    for start in range(0, tokens, RENEWED):
        some = slice(start, start + RENEWED)
        branches = code.entered_by[first[some, None] + np.arange(ROWS)[:, None]]  # (RENEWED, ROWS, R, nodes)
        squares = np.square(_halves(code.table[branches] * scale[some] + shift[some]))
        places = (branches >> code.bits) + nodes * every[:, None]
        for t, (place, square) in enumerate(zip(places, squares, strict=True), start):
            one, other = _halves(cost.take(place) + square)
            np.less(other, one, out=second[t])
            cost = np.minimum(one, other)
        if ends is not None:
            cost = _halves(cost - cost.min(axis=1, keepdims=True))
    if ends is None:
        turned = rotated(np.arange(nodes), code.bits * (tokens - free))
        ends = turned[cost[:, turned].argmin(axis=1)]
    states, node = np.empty((rows, tokens), np.uint16), ends
    for t in reversed(range(tokens)):
        state = code.entered_by[first[t] + second[t, every, node], node]
        states[:, t] = state
        node = state >> code.bits
    return states


def _halves(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round numbers to halves (float16), several times as fast as NumPy does; those too large for a half stay finite.

    The sum with 1.5 * 2**13 times a number's power of two has no bits below those of a half.
    """
    exponent = np.maximum(x.view(np.int32) & 0x7F800000, (127 - 14) << 23)  # halves below 2**-14 are evenly spaced
    large: NDArray[np.float32] = (exponent + (13 << 23 | 1 << 22)).view(np.float32)
    return x + large - large


def rotated(node: NDArray[np.int64], by: int) -> NDArray[np.int64]:
    """Rotate the bits of nodes to the left."""
    by %= NODE_BITS
    return (node << by | node >> (NODE_BITS - by)) & ((1 << NODE_BITS) - 1)
