"""Trellis codes: a bit string for each run of numbers, a table of levels, and the search for a good string.

The level of a number is the table's entry at the last ``log_states`` bits of its string up to this number, of which
``bits`` are its own code. So each code serves several numbers, and a decoder needs a shift and a look-up for each of
them, all in parallel. A string bites its own tail: the bits before its first number are those of its last ones, so
nothing beside the codes is stored.

The bits before a number are a node, and a branch leads from it for each code. The branches of a node are in the order
of their levels: row r of a node is its branch with the code ``r ^ its first bits``, and all levels of row r are smaller
than those of row r + 1. So each node is entered by one branch of each row. The search only follows branches of the
two rows that are nearest to a number: two branches enter a node, where a full search compares 2**bits. It computes in
halves.

A table may have fewer levels than states: then a few bits, parities of the node's bits, choose among the levels of a
row. Parities are computed for many numbers at once, so a decoder looks a number up in a small table. This is a
convolutional code, as in trellis-coded quantisation.

Sources: the bitshift trellis and its approximate tail-biting, Tseng et al., "QTIP" (arXiv 2406.11235); a few bits that
choose among levels, Marcellin and Fischer, "Trellis coded quantization" (1990); the search, Viterbi (1967); training of
a table on the best paths, after Lloyd (1982).
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.runtime.device import array_module

LENGTH = 128  # numbers of a string, at most
WINDOW = 16  # numbers before and after a string's end that decide where it bites its tail
LOOKAHEAD = 8  # numbers after which the best path has mostly met the final one, on a GPU that follows it in parts
BINS, REACH = 256, 4.0  # numbers are looked up in BINS bins over -REACH .. REACH, for the nearest rows
FAR = np.float16(20000)  # cost of nodes that a string does not begin at
RENEWED = 16  # numbers after which the least cost is subtracted, so that halves stay precise
# Bits of a state, and masks of a node's bits, of codes with 32 levels, by the bits of a number.
SMALL = {4: (9, (16,)), 3: (8, (1, 24)), 2: (7, (5, 7, 25))}
SIZES = (4, 8), (4, 9), (4, 10), (3, 6), (3, 8), (3, 9), (2, 6), (2, 7), (2, 8)  # bits of a number and of a state
KERNEL = Path(__file__).with_name("viterbi.h")


@dataclass(frozen=True, eq=False)
class TrellisCode:
    """A trellis code with ``bits`` bits for each number.

    table: the level of each state, (2**log_states,) float32 that are halves; log_states is 2 * bits or more.
    rows: how many are searched; 2 on a GPU.
    """

    bits: int
    table: NDArray[np.float32]
    rows: int = 2

    @property
    def node_bits(self) -> int:
        return int(self.table.size).bit_length() - 1 - self.bits

    def encode(
        self,
        xp: Any,
        target: Any,
        gain: Any,
        root: Any,
        others: tuple[Any, Any, Any] | None = None,
        down: bool = False,
        former: Any | None = None,
    ) -> tuple[Any, Any]:
        """Find strings with a small sum of ``(root * (gain * level - target))**2``, one for each coordinate.

        target: (H, B, T) of the module ``xp``, NumPy or MLX; MLX needs a GPU with CUDA. gain, root: (H, T). Each
        coordinate is cut into strings of about the same length, at most ``LENGTH`` numbers.
        others: for coordinates that are chosen one by one, how far the error of each moves the targets of the others,
        (H, B, B); the exact numbers, (H, B, T); and their errors before. down: begin with the last coordinate.
        former: states of strings that were found for other targets; the new ones bite their tails at the same nodes.
        Returns the states (H, B, T) uint16, and their levels (H, B, T).
        """
        if xp is not np:
            return _search_on_gpu(self, target, gain, root, others, down, former)
        states, changes = np.empty(target.shape, np.uint16), np.zeros(target.shape, np.float16)
        order = range(target.shape[1])[:: -1 if down else 1]
        for done, i in enumerate(order):
            moved = np.zeros((target.shape[0], target.shape[2]), np.float16)
            for j in order[:done] if others else ():
                moved = _multiply_add(others[0][:, i, j, None].astype(np.float16), changes[:, j], moved)
            for some in cuts(target.shape[2]):
                string = [x[:, some] for x in (target[:, i] - moved, gain, root)]
                last = _around_ends(self, *string) if former is None else former[:, i, some.stop - 1]
                states[:, i, some] = _search(self, last, 0, *string)
            if others:
                changes[:, i] = gain * self.table[states[:, i]] - others[1][:, i] - others[2][:, i]
        return states, self.table[states]

    @functools.cached_property
    def row_of_bin(self) -> NDArray[np.uint8]:
        """The first of the rows to search, for each bin."""
        means = self.table[states_of_rows(self.bits, self.node_bits)].mean(axis=0)
        centres = (np.arange(BINS) + 0.5) * (2 * REACH / BINS) - REACH
        middles = np.lib.stride_tricks.sliding_window_view(means, self.rows).mean(axis=1)
        return np.searchsorted((middles[1:] + middles[:-1]) / 2, centres).astype(np.uint8)


@functools.cache
def trained_code(
    bits: int, log_states: int, parities: tuple[int, ...] = (), strings: int = 2048, iterations: int = 60
) -> TrellisCode:
    """Return a code whose table was trained on normal numbers.

    parities: masks of a node's bits. Each gives one bit, the parity of the node's bits in the mask, and these bits
    choose among the levels of a row. Without masks, each node has its own level in each row.
    Training starts with equally likely levels: the smallest ones in row 0, and so on. Without masks, those of a row are
    in a random order. Then each level becomes the mean of the numbers that were coded by it, again and again.
    """
    random = np.random.default_rng([bits, log_states])
    nodes = np.arange(1 << (log_states - bits))
    places, count = random.permutation(nodes.size), nodes.size
    if parities:
        places = sum(_parity(nodes & mask) << i for i, mask in enumerate(reversed(parities)))
        count = 1 << len(parities)
    which = np.empty(1 << log_states, np.int64)  # of the levels each state has
    which[states_of_rows(bits, log_states - bits)] = places[:, None] + count * np.arange(1 << bits)
    levels = np.quantile(random.normal(size=1 << 18), (np.arange(count << bits) + 0.5) / (count << bits))
    for _ in range(iterations):
        numbers = random.normal(size=(strings, LENGTH)).astype(np.float32)
        states = encode_alone(_code(bits, levels[which]), numbers)[0].reshape(-1)
        counts = np.bincount(which[states], minlength=levels.size)
        sums = np.bincount(which[states], numbers.reshape(-1), minlength=levels.size)
        levels = np.where(counts > 0, sums / np.maximum(counts, 1), levels)
    return _code(bits, levels[which])


def encode_alone(code: TrellisCode, numbers: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Encode numbers (R, T) without gains and weights, on MLX's default device; returns states and levels (R, T)."""
    xp = array_module()
    x = xp.array(numbers)
    states, levels = code.encode(xp, x[:, None], xp.ones_like(x), xp.ones_like(x))
    return np.array(states[:, 0]), np.array(levels[:, 0])


def _parity(x: NDArray[np.int64]) -> NDArray[np.int64]:
    for shift in (4, 2, 1):  # a node has 8 bits at most
        x = x ^ x >> shift
    return x & 1


def cuts(tokens: int) -> list[slice]:
    count = -(-tokens // LENGTH)
    return [slice(i * tokens // count, (i + 1) * tokens // count) for i in range(count)]


def _code(bits: int, levels: NDArray[np.float64]) -> TrellisCode:
    return TrellisCode(bits, levels.astype(np.float16).astype(np.float32))


def states_of_rows(bits: int, node_bits: int) -> NDArray[np.int64]:
    """Return the state that the branch of each row leads to, from each node, (nodes, rows)."""
    node, row = np.ogrid[: 1 << node_bits, : 1 << bits]
    return np.asarray(node << bits | (row ^ (node >> (node_bits - bits))))


# ---- the search on NumPy, which defines the results


def _around_ends(code: TrellisCode, *string: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the best last states of strings, from the numbers around their ends."""
    tokens = string[0].shape[1]
    around = np.r_[max(0, tokens - WINDOW) : tokens, : min(tokens, WINDOW)]
    before = len(around) - min(tokens, WINDOW)
    return _search(code, None, before, *(x[:, around] for x in string))[:, before - 1]


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
    bits, node_bits = code.bits, code.node_bits
    every, node = np.arange(rows)[:, None], np.arange(1 << node_bits)[None]
    offset = np.clip(target * (np.float32(BINS / (2 * REACH)) / gain) + BINS // 2, 0, BINS - 1)
    first = code.row_of_bin[offset.astype(np.int64)].astype(np.int64)
    cost = np.zeros((rows, node.size), np.float16)
    if last is not None:
        ends = last.astype(np.int64) & (node.size - 1)
        cost[:] = FAR
        cost[every[:, 0], ends] = 0
    came_from = []
    for t in range(tokens):
        scale, shift = (gain[:, t] * root[:, t]).astype(np.float16), (-target[:, t] * root[:, t]).astype(np.float16)
        best, source = np.full_like(cost, np.inf), np.zeros(cost.shape, np.int64)
        for n in range(code.rows):
            before = ((node ^ (first[:, t, None] + n)) & ((1 << bits) - 1)) << (node_bits - bits) | node >> bits
            level = code.table[before << bits | node & ((1 << bits) - 1)].astype(np.float16)
            off = _multiply_add(level, scale[:, None], shift[:, None])
            other = _multiply_add(off, off, cost[every, before])
            less = other < best
            best, source = np.where(less, other, best), np.where(less, before, source)
        cost = best
        came_from.append(source)
        if last is not None and t % RENEWED == RENEWED - 1:
            cost = cost - cost.min(axis=1, keepdims=True)
    if last is None:
        places = _rotated(np.arange(node.size), bits * (tokens - free), node_bits)
        state = places[cost[:, places].argmin(axis=1)]
    else:
        state = ends
    states = np.empty((rows, tokens), np.uint16)
    for t in reversed(range(tokens)):
        before = came_from[t][every[:, 0], state]
        states[:, t] = before << bits | state & ((1 << bits) - 1)
        state = before
    return states


def _multiply_add(a: NDArray[np.float16], b: NDArray[np.float16], c: NDArray[np.float16]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return (a.astype(np.float32) * b + c).astype(np.float16)


def _rotated(x: Any, by: int, width: int) -> Any:
    by %= width
    return (x << by | x >> (width - by)) & ((1 << width) - 1)


# ---- the same on CUDA: viterbi.h

CUDA = r"""
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long size_type;
#define SHARED __shared__
#define ALIGNED __attribute__((aligned(16)))
#define UNROLL _Pragma("unroll")
#define LANES_MEET __syncwarp()
#define THREAD_INDEX int(threadIdx.x)
#define GROUP_X int(blockIdx.x)
#define GROUP_Y int(blockIdx.y)
#define READ_8(from, to) { uint2 read_ = *(const uint2*)(from); (to)[0] = read_.x; (to)[1] = read_.y; }
#define WRITE_8(to, low, high) *(uint2*)(to) = make_uint2(low, high)
#define FUNCTION static __device__ __forceinline__

template <typename T, typename F>
FUNCTION void put(T* to, F x) { *to = T(x); }
template <typename T>
FUNCTION T lane_xor(T x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FUNCTION int of_lane(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
FUNCTION bool in_any_lane(bool x) { return __any_sync(0xffffffffu, x); }
FUNCTION u32 rotated(u32 x, u32 by) { return __funnelshift_l(x, x, by); }
FUNCTION u32 low_twice(u32 x) {
    u32 pair;
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low}; }" : "=r"(pair) : "r"(x));
    return pair;
}
FUNCTION u32 high_twice(u32 x) {
    u32 pair;
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high}; }" : "=r"(pair) : "r"(x));
    return pair;
}
FUNCTION u32 pack_halves(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
FUNCTION float half_of(u32 pair, int i) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(u16(pair >> (16 * i))));
    return x;
}
FUNCTION u32 pair_multiply_add(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
FUNCTION u32 pair_subtract(u32 a, u32 b) {
    u32 d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
FUNCTION u32 pair_min(u32 a, u32 b) {
    u32 d;
    asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
FUNCTION u32 pair_less(u32 a, u32 b) {
    u32 d;
    asm("set.lt.u32.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
"""
NUMBERS = ("target", "gain", "root", "within", "exact", "before", "former")
TABLES = ("table", "level_pairs", "masks", "row_of_bin")
INPUTS = (*NUMBERS, *TABLES, "sizes")


def defined(code: TrellisCode, block: int, dependent: bool, former: bool) -> dict[str, int | float]:
    """Return the constants that are compiled into the kernel."""
    nodes = 1 << code.node_bits
    return {
        "BITS": code.bits,
        "BRANCHES": 1 << code.bits,
        "NODE_BITS": code.node_bits,
        "NODES": nodes,
        "LANES": nodes // 2,
        "GROUPS": 64 // nodes,
        "PAIRS": LENGTH // nodes,
        "PERIOD": code.node_bits // math.gcd(code.node_bits, code.bits),
        "LENGTH": LENGTH,
        "WINDOW": WINDOW,
        "LOOKAHEAD": LOOKAHEAD,
        "OWN": LENGTH * 2 // nodes,
        "BINS": BINS,
        "REACH": REACH,
        "BLOCK": block,
        "DEPENDENT": int(dependent),
        "FORMER": int(former),
    }


def laid_out(code: TrellisCode) -> tuple[NDArray[Any], ...]:
    """Return the ``TABLES`` that the kernel reads.

    They are the levels of all states; pairs of levels (period, rows, nodes / 2) at the places that branches lead to; a
    mask (period, first rows) for each first row; and the first row of each bin.
    A mask says which bits of a place change, for two rows: those of the lane from bits 0 and 5 on, that of the half in
    bits 14 and 19. Bits from 20 on count rows in the pairs of levels.
    """
    bits, width = code.bits, code.node_bits
    period, branches = width // math.gcd(width, bits), 1 << bits
    place, row = np.arange(1 << width), np.arange(branches)[:, None]
    levels, masks = [], []
    for t in range(period):
        node = _rotated(place, bits * (t + 1), width)
        before = ((node ^ row) & (branches - 1)) << (width - bits) | node >> bits
        levels.append(code.table[before << bits | node & (branches - 1)])
        changed = _rotated(row[:, 0] << (width - bits), -bits * t, width)  # bits of a place, for a branch of each row
        one, two = changed[:-1], changed[1:]
        lanes, halves = one >> 1 | two >> 1 << 5, (one & 1) << 14 | (two & 1) << 19
        masks.append(lanes | halves | (t * branches + row[:-1, 0]) << 20)
    return code.table, np.stack(levels).astype(np.float16).view(np.uint32), np.uint32(masks), code.row_of_bin


def _search_on_gpu(
    code: TrellisCode, target: mx.array, gain: mx.array, root: mx.array, others: Any, down: bool, former: Any
) -> tuple[mx.array, mx.array]:
    if code.rows != 2:
        raise ValueError(f"the kernel searches 2 rows of levels, not {code.rows}; use NumPy's arrays for other numbers")
    (heads, block, tokens), strings = target.shape, len(cuts(target.shape[2]))
    groups, sizes = 64 >> code.node_bits, _sizes(tokens, strings, down)
    within, exact, before = others or (sizes, target, target)
    pairs = mx.repeat(within.astype(mx.float16), 2, axis=-1).view(mx.uint32) if others else sizes
    found: tuple[mx.array, mx.array] = _kernel(tuple(defined(code, block, bool(others), former is not None).items()))(
        inputs=[target, gain, root, pairs, exact, before, sizes if former is None else former, *_on_gpu(code), sizes],
        grid=(-(-strings // groups) * 32, heads, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[target.shape, target.shape],
        output_dtypes=[mx.uint16, target.dtype],
    )
    return found


@functools.cache
def _on_gpu(code: TrellisCode) -> list[mx.array]:
    return [mx.array(table) for table in laid_out(code)]


@functools.cache
def _sizes(*sizes: int) -> mx.array:
    return mx.array(sizes, mx.int32)


@functools.cache
def _kernel(constants: tuple[tuple[str, int | float], ...]) -> Any:
    return mx.fast.cuda_kernel(
        name="trellis_search_" + "_".join(str(value).replace(".", "_") for _, value in constants),
        input_names=list(INPUTS),
        output_names=["chosen", "chosen_levels"],
        header="".join(f"#define {name} {value}\n" for name, value in constants) + CUDA,
        source=KERNEL.read_text(encoding="utf-8"),
    )


def main() -> None:
    """Print the mean squared error of normal numbers in trained codes, and how long the search takes."""
    xp = array_module()
    numbers = np.random.default_rng(9).normal(size=(90, 3780)).astype(np.float32)
    given = (xp.array(numbers[:, None]), *(xp.ones(numbers.shape, dtype=xp.float32) for _ in range(2)))
    for bits, log_states, parities in (*((*size, ()) for size in SIZES), *((n, *SMALL[n]) for n in SMALL)):
        code, times = trained_code(bits, log_states, parities), []
        for _ in range(3):
            started = time.perf_counter()
            found = np.array(code.encode(xp, *given)[1])[:, 0]
            times.append(time.perf_counter() - started)
        error, each = np.square(found - numbers).mean(), 1e9 * min(times) / numbers.size
        levels = 1 << (bits + len(parities) if parities else log_states)
        print(
            f"{bits} bits, {1 << log_states} states, {levels} levels: error {error:.5f}, {each:.2f} ns a number",
            flush=True,
        )


if __name__ == "__main__":
    main()
