"""Attention over trellis codes of 4 bits on a GPU: how long it takes, beside attention over the codec's scalar codes.

    python -m benches.trellis_attention --tokens 131072 32768

The codes are those of ``viterbi.SMALL``: a number has one of 32 levels. 4 bits of the level are its row, and one is a
bit of its node. Both follow from the string by one shift and one exclusive or, for a whole word of codes. So a look-up
in a table of 1,024 entries gives the levels of two numbers, as with scalar codes. The two strings of a pair lie bit by
bit beside each other, so that a byte has one code of each:

    pairs of keys     two neighbouring coordinates; a string is 128 tokens of a coordinate
    pairs of values   two tokens, 16 apart; a string is 64 tokens of a coordinate, of each 32 the first or the last 16

Codes are random, and finer tokens and sinks are left out. Times are medians in microseconds of both launches, queued,
and in brackets one after the other. "Scalar" is the codec as it is, with its finer tokens; "coarse" is without them.
CUDA only, compute capability 9.0.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from benches.viterbi import TrellisCode, trained_code
from turboquant import CacheCodec
from turboquant.attention import gpu
from turboquant.kernels.encoding import encode_layer
from turboquant.kernels.kernel_text import defines, text
from turboquant.kernels.launch import launch
from turboquant.kernels.programs import compile_text

BITS, LOG_STATES, TAPS = (
    4,
    9,
    (4, 0),
)  # of a node's bits, the one that chooses a level in a pair's first and second string
DIM, TOKENS = 128, 128  # coordinates; tokens whose codes stand together in memory
QUERY_HEADS, HEADS = 32, 8
NAMES = ("queries", "key_codes", "key_scales", "value_codes", "value_scales", "levels", "constants", "plan")
TABLE_WORDS = 1024 * 32  # a copy for each bank
WARPS = 16  # SIMD-groups of a thread-group, for one row
CONSTANTS = {"DIM": DIM, "HEADROOM": gpu.HEADROOM, "TABLE_WORDS": TABLE_WORDS}
OF_ONE = {"WARPS": WARPS, "THREADS": 32 * WARPS, "SHARED_WORDS": TABLE_WORDS + DIM // 8 * 32 + WARPS * 24 + 16}
OF_MANY = {
    "THREADS": 256,
    "BLOCK_WORDS": 32,
    "TILE_WORDS": 32 * DIM,
    "SHARED_WORDS": TABLE_WORDS + 2 * (2 * 32 * DIM + 256),
}
CUDA = r"""
#define SHIFTED_IN(before, word) __funnelshift_l(before, word, 10)
#define SHIFTED_OUT(word, next) __funnelshift_r(word, next, 9)
#define PLACE(rows, others, i) bytes_of(rows, others, 0xe604 | (i) << 4)
#define NEXT_PLACE(rows, others, i) bytes_of(rows, others, 0xf705 | (i) << 4)
#define GROUP_BARRIER(group) asm volatile("bar.sync %0, 128;" ::"r"((group) + 1) : "memory")
FUNCTION u32 bytes_of(u32 x, u32 y, u32 which) {
    u32 z;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(which));
    return z;
}
// A word of the table, which begins where a thread-group's shared memory does.
FUNCTION u32 levels_at(u32 place) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1+1024];" : "=r"(x) : "r"(place));
    return x;
}
#define LEVELS_AT(place) levels_at(place)
FUNCTION u32 word_of_lane(u32 x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
FUNCTION float half_of(u32 pair, int i) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((unsigned short)(pair >> (16 * i))));
    return x;
}
"""
# Values of a tile are pairs of tokens, so the sum is along the halves of a block, as for keys.
CUDA_OF_MANY = r"""
FUNCTION void multiply_pairs(float (&sums)[DIM / 2], const u32 (&left)[4], const u32* tile, int k) {
    const int row_of_blocks = DIM / 8 * BLOCK_WORDS;
    group_multiply<0>(sums, left, described(tile + 2 * k * row_of_blocks, row_of_blocks * 4, BLOCK_WORDS * 4), true);
}
"""


def body(many: bool) -> str:
    """Return the text of the kernel for up to 8 queries of each KV head, or for 64 at a time."""
    return Path(__file__).with_name(f"trellis_{'many' if many else 'one'}.h").read_text(encoding="utf-8")


def constants(many: bool) -> dict[str, int]:
    """Return what is compiled into a kernel."""
    return CONSTANTS | (OF_MANY if many else OF_ONE)


def types() -> dict[str, str]:
    """Return the types of a kernel's arguments."""
    kinds = {"levels": "u32", "constants": "float", "plan": "int"} | {name: "u32" for name in NAMES if "codes" in name}
    return {name: f"const {kinds.get(name, 'half')}*" for name in NAMES} | {"partials": "float*"}


def source(symbol: str, many: bool) -> str:
    """Return the whole text of a kernel for CUDA."""
    files = ("cuda_types.h", "cuda.h", "hopper.h", "layout.h", "codes.h", "many.h")
    headers = "".join(text(name) for name in files if many or name not in ("hopper.h", "many.h"))
    arguments = ", ".join(f"{kind} {name}" for name, kind in types().items())
    head = f'extern "C" __global__ void __launch_bounds__(THREADS, 1) {symbol}({arguments}) {{\n'
    functions = CUDA + (CUDA_OF_MANY if many else "")
    return defines(tuple(constants(many).items())) + headers + functions + head + body(many) + "}\n"


def table_of(codes: tuple[TrellisCode, TrellisCode]) -> NDArray[np.uint32]:
    """Return pairs of levels (1024,) of two strings of a pair.

    An index has the bit of the first string's node, then the bits of the two rows, highest first and in turn, and then
    the bit of the second string's node.
    """
    index, states = np.arange(1024), np.arange(1 << LOG_STATES)
    pairs = np.empty((1024, 2), np.float16)
    for string, (code, tap) in enumerate(zip(codes, TAPS, strict=True)):
        levels = np.empty((1 << BITS, 2), np.float16)
        node = states >> BITS
        levels[states & 15 ^ node >> 1, node >> tap & 1] = code.table
        row = sum((index >> (1 + 2 * k + string) & 1) << (3 - k) for k in range(4))
        pairs[:, string] = levels[row, index >> (9 if string else 0) & 1]
    return pairs.view(np.uint32)[:, 0]


def levels_of(codes: NDArray[np.int64], code: TrellisCode) -> NDArray[np.float32]:
    """Return the levels of strings of codes (..., T), which bite their tails."""
    one, two = np.roll(codes, 1, -1), np.roll(codes, 2, -1)
    return code.table[(two & 1) << 8 | one << 4 | codes]


def packed(pairs: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Pack the codes of pairs of strings (..., 2, 16) to words (..., 4): 4 numbers of both strings a word."""
    bits = sum((pairs[..., string, :] >> (3 - k) & 1) << (2 * k + string) for k in range(4) for string in range(2))
    return np.ascontiguousarray(np.asarray(bits).astype(np.uint8)).view(np.uint32)


def of_blocks(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Put words (H, blocks, DIM / 8, 8, 4, 4) of lanes' 16 numbers in order: of 64 tokens the first 8 of each lane."""
    heads, blocks, rows = words.shape[:3]
    return np.ascontiguousarray(words.reshape(heads, blocks, rows, 32, 2, 2).swapaxes(3, 4))


def pack_keys(codes: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Pack codes (H, T, DIM): lane 4 g + c has coordinates 8 j + 2 c and the next, of tokens from 16 g on."""
    heads, tokens, _ = codes.shape
    return of_blocks(packed(codes.reshape(heads, tokens // 128, 8, 16, DIM // 8, 4, 2).transpose(0, 1, 4, 2, 5, 6, 3)))


def pack_values(codes: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Pack codes (H, T, DIM): lane 4 g + c has coordinate 8 j + g, of tokens from 32 c on and from 32 c + 16 on."""
    heads, tokens, _ = codes.shape
    return of_blocks(packed(codes.reshape(heads, tokens // 128, 4, 2, 16, DIM // 8, 8).transpose(0, 1, 5, 6, 2, 3, 4)))


def key_levels(codes: NDArray[np.int64], pair: tuple[TrellisCode, TrellisCode]) -> NDArray[np.float32]:
    """Return the levels (H, T, DIM) of keys' codes."""
    heads, tokens, _ = codes.shape
    strings = codes.reshape(heads, tokens // 128, 128, DIM).swapaxes(2, 3)
    found = np.stack([levels_of(strings[:, :, i::2], code) for i, code in enumerate(pair)], axis=3)
    return found.reshape(strings.shape).swapaxes(2, 3).reshape(codes.shape)


def value_levels(codes: NDArray[np.int64], pair: tuple[TrellisCode, TrellisCode]) -> NDArray[np.float32]:
    """Return the levels (H, T, DIM) of values' codes."""
    heads, tokens, _ = codes.shape
    strings = codes.reshape(heads, tokens // 128, 4, 2, 16, DIM).transpose(0, 1, 5, 3, 2, 4)
    strings = strings.reshape(heads, tokens // 128, DIM, 2, 64)
    found = np.stack([levels_of(strings[..., i, :], code) for i, code in enumerate(pair)], axis=-2)
    return found.reshape(heads, tokens // 128, DIM, 2, 4, 16).transpose(0, 1, 4, 3, 5, 2).reshape(codes.shape)


def plan_of(rows: int, n_heads: int, n_kv_heads: int, tokens: int, splits: int, scale: float) -> NDArray[np.int32]:
    """Return the numbers of a launch, see layout.h."""
    numbers = np.zeros(gpu.SIZES + 2, np.int32)
    numbers[:9] = rows, n_heads, n_kv_heads, 1, tokens, 0, 0, splits, 0
    numbers[gpu.SIZES :] = np.array([scale * math.log2(math.e), DIM**-0.5], np.float32).view(np.int32)
    return numbers


def pair_of_codes() -> tuple[TrellisCode, TrellisCode]:
    """Return the codes of the first and the second string of a pair."""
    first, second = (trained_code(BITS, LOG_STATES, (1 << tap,)) for tap in TAPS)
    return first, second


def measure(step: Callable[[mx.array], mx.array], queries: mx.array, calls: int = 50) -> tuple[float, float]:
    """Return the microseconds of a call, queued and one after the other: medians of 5."""

    def queued() -> float:
        results = [step(queries) for _ in range(calls)]
        begin = time.perf_counter()
        mx.eval(results)
        return (time.perf_counter() - begin) / calls * 1e6

    def in_turn() -> float:
        x = queries
        for _ in range(calls):
            x = step(x).astype(queries.dtype) * 0.5 + queries
        begin = time.perf_counter()
        mx.eval(x)
        return (time.perf_counter() - begin) / calls * 1e6

    def median(way: Callable[[], float]) -> float:
        way()
        return statistics.median(way() for _ in range(5))

    return median(queued), median(in_turn)


def compare(tokens: int, rows: int) -> str:
    """Measure attention of so many rows over so many tokens; return a line."""
    random, shape = np.random.default_rng(0), (HEADS, tokens, DIM)
    keys, values = (mx.random.normal(shape).astype(mx.float16) for _ in range(2))
    scalar, coarse = (encode_layer(keys, values, CacheCodec(extra_bits=extra)) for extra in (0.2, 0.0))
    queries = mx.random.normal((rows, QUERY_HEADS, 1, DIM)).astype(mx.float16)
    mx.eval(scalar.tensors(), coarse.tensors(), queries)
    many, scale = rows > 1, DIM**-0.5
    splits = min(32, tokens // 64) if many else min(16, tokens // TOKENS)
    gpu.attend_layer(queries, coarse, scale)  # makes the layer's constants
    of_layer = coarse.derived["constants"]
    codes = [mx.array(random.integers(0, 1 << 32, (HEADS, tokens // 8 * DIM), np.uint32)) for _ in range(2)]
    scales = [mx.array(random.uniform(0.02, 0.2, (HEADS, tokens)).astype(np.float16)) for _ in range(2)]
    numbers = mx.array(plan_of(rows, QUERY_HEADS, HEADS, tokens, splits, scale))
    symbol, code = compile_text("trellis_many" if many else "trellis_one", source("SYMBOL", many))
    table, folded = mx.array(table_of(pair_of_codes())), rows * QUERY_HEADS // HEADS
    threads, merge = constants(many)["THREADS"], gpu._merge(queries.shape, HEADS, queries.dtype, ())

    def trellis(x: mx.array) -> mx.array:
        (partials,) = mx.fast.precompiled_cuda_kernel(
            name=symbol,
            compiled_source=code,
            inputs=[x, codes[0], scales[0], codes[1], scales[1], table, of_layer, numbers],
            output_shapes=[(HEADS, splits, folded, DIM + 4)],
            output_dtypes=[mx.float32],
            scalars=[],
            grid=(splits // (2 if many else 1) * threads, HEADS, -(-folded // 64) if many else 1),
            threadgroup=(threads, 1, 1),
            shared_memory=4 * constants(many)["SHARED_WORDS"],
            ensure_row_contiguous=True,
        )
        return launch(merge, [partials, of_layer, numbers])[0]

    ways: dict[str, Callable[[mx.array], mx.array]] = {
        "scalar": lambda x: gpu.attend_layer(x, scalar, scale).output,
        "coarse": lambda x: gpu.attend_layer(x, coarse, scale).output,
        "trellis": trellis,
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(3):
        for name, step in ways.items():
            found[name].append(measure(step, queries))
    parts = [", ".join(f"{queued:.0f} ({in_turn:.0f})" for queued, in_turn in times) for times in found.values()]
    return f"{tokens:,} tokens, {rows} rows: " + "; ".join(map(" ".join, zip(found, parts, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072, 32768])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    arguments = parser.parse_args()
    for tokens in arguments.tokens:
        for rows in arguments.rows:
            print(compare(tokens, rows), flush=True)


if __name__ == "__main__":
    main()
