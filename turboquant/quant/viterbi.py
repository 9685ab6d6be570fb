"""Trellis codes: bit strings whose levels depend on more bits than a number's own, and the search for a good string.

The level of a number is the table's entry at the last ``log_states`` bits of its string up to this number, of which
``bits`` are its own code. So each code serves several numbers. A string bites its own tail: the bits before its first
number are those of its last ones, so nothing beside the codes is stored.

The bits before a number are a node, and a branch leads from it for each code. The branches of a node are in the order
of their levels: row r of a node is its branch with the code ``r ^ its first bits``, and all levels of row r are smaller
than those of row r + 1. So each node is entered by one branch of each row. The search only follows branches of the
two rows that are nearest to a number: two branches enter a node, where a full search compares 2**bits. It computes in
halves. kernels/trellis_search.py does the same on a GPU.

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
FAR = np.float16(20000)  # cost of nodes that a string does not begin at
RENEWED = 16  # numbers after which the least cost is subtracted, so that halves stay precise
ROWS = 2  # that are searched


@dataclass(frozen=True, eq=False)
class TrellisCode:
    """A trellis code with ``bits`` bits for each number, 2 to 4, and ``NODE_BITS`` bits of a node.

    levels: (2**bits, 2**n) float32 that are halves: those of each row, of which n parities choose one.
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
    states, changes = np.empty(target.shape, np.uint16), np.zeros(target.shape, np.float16)
    order = range(block)[:: -1 if down else 1]
    gain_of_strings, root_of_strings = gain.reshape(-1, length), root.reshape(-1, length)
    for done, i in enumerate(order):
        moved = np.zeros((heads, tokens), np.float16)
        for j in order[:done] if others is not None else ():
            moved = _multiply_add(others[0][:, i, j, None].astype(np.float16), changes[:, j], moved)
        strings = (target[:, i] - moved).reshape(-1, length), gain_of_strings, root_of_strings
        last = _around_ends(code, *strings) if former is None else former[:, i].reshape(-1, length)[:, -1]
        states[:, i] = _search(code, last, 0, *strings).reshape(heads, tokens)
        if others is not None:
            changes[:, i] = gain * code.table[states[:, i]] - others[1][:, i] - others[2][:, i]
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
    rows, tokens = target.shape
    bits, branches = code.bits, 1 << code.bits
    every, node = np.arange(rows)[:, None], np.arange(1 << NODE_BITS)[None]
    offset = np.clip(target * (np.float32(BINS / (2 * REACH)) / gain) + BINS // 2, 0, BINS - 1)
    first = code.row_of_bin[offset.astype(np.int64)].astype(np.int64)
    ends = None if last is None else last.astype(np.int64) & (node.size - 1)
    cost = np.full((rows, node.size), 0 if ends is None else FAR, np.float16)
    if ends is not None:
        cost[every[:, 0], ends] = 0
    came_from = []
    for t in range(tokens):
        scale, shift = (gain[:, t] * root[:, t]).astype(np.float16), (-target[:, t] * root[:, t]).astype(np.float16)
        best, source = np.full_like(cost, np.inf), np.zeros(cost.shape, np.int64)
        for n in range(ROWS):
            before = ((node ^ (first[:, t, None] + n)) & (branches - 1)) << (NODE_BITS - bits) | node >> bits
            level = code.table[before << bits | node & (branches - 1)].astype(np.float16)
            off = _multiply_add(level, scale[:, None], shift[:, None])
            other = _multiply_add(off, off, cost[every, before])
            less = other < best
            best, source = np.where(less, other, best), np.where(less, before, source)
        cost = best
        came_from.append(source)
        if ends is not None and t % RENEWED == RENEWED - 1:
            cost = cost - cost.min(axis=1, keepdims=True)
    if ends is None:
        places = rotated(np.arange(node.size), bits * (tokens - free))
        ends = places[cost[:, places].argmin(axis=1)]
    state = ends
    states = np.empty((rows, tokens), np.uint16)
    for t in reversed(range(tokens)):
        before = came_from[t][every[:, 0], state]
        states[:, t] = before << bits | state & (branches - 1)
        state = before
    return states


def _multiply_add(a: NDArray[np.float16], b: NDArray[np.float16], c: NDArray[np.float16]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return (a.astype(np.float32) * b + c).astype(np.float16)


def rotated(node: NDArray[np.int64], by: int) -> NDArray[np.int64]:
    """Rotate the bits of nodes to the left."""
    by %= NODE_BITS
    return (node << by | node >> (NODE_BITS - by)) & ((1 << NODE_BITS) - 1)
