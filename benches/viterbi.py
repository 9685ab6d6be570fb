"""Trellis codes: a bit string for each run of numbers, a table of levels, and the search for the best string.

The level of a number is the table's entry at the last ``log_states`` bits of its string up to this number, of which
``bits`` are its own. So each code serves several numbers, a decoder needs no more than a shift and a look-up for each
of them, and all in parallel. A string bites its own tail: the bits before its first number are those of its last ones,
so nothing beside the codes is stored.

Sources: the bitshift trellis and its approximate tail-biting, Tseng et al., "QTIP" (arXiv 2406.11235); the search,
Viterbi (1967); training of a table on the best paths, after Lloyd (1982).
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.runtime.device import array_module

LENGTH = 128  # numbers of a string, at most
THREADS = 32  # for each string on a GPU


@dataclass(frozen=True)
class TrellisCode:
    """A trellis code with ``bits`` bits for each number. table: the level of each state, (2**log_states,) float32."""

    bits: int
    table: NDArray[np.float32]

    def encode(self, xp: Any, target: Any, gain: Any, weight: Any) -> tuple[Any, Any]:
        """Find the strings with a small sum of ``weight * (gain * level - target)**2``.

        target, gain, weight: (R, T) float32 of the module ``xp``, NumPy or MLX; MLX needs a GPU with CUDA. Each row is
        cut into strings of about the same length, at most ``LENGTH`` numbers.
        Returns the states (R, T) uint16, and their levels (R, T) float32.
        """
        if xp is not np:
            return _encode_on_gpu(self, target, gain, weight)
        strings = [_tail_biting(self, *(x[:, some] for x in (target, gain, weight))) for some in cuts(target.shape[1])]
        states = np.concatenate(strings, axis=1)
        return states, self.table[states]


@functools.cache
def trained_code(bits: int, log_states: int, strings: int = 2048, iterations: int = 60) -> TrellisCode:
    """Return a code whose table was trained on normal numbers.

    It starts with equally likely levels. The 2**bits that can follow a state are far from each other, in an order of
    their own. Then each level becomes the mean of the numbers that were coded by it, again and again.
    """
    random = np.random.default_rng([bits, log_states])
    branches, contexts = 1 << bits, 1 << (log_states - bits)
    ranks = np.stack([random.permutation(branches) * contexts + i for i in random.permutation(contexts)])
    levels = np.quantile(random.normal(size=1 << 18), (ranks.reshape(-1) + 0.5) / ranks.size)
    for _ in range(iterations):
        numbers = random.normal(size=(strings, LENGTH)).astype(np.float32)
        states = encode_alone(TrellisCode(bits, levels.astype(np.float32)), numbers)[0].reshape(-1)
        counts = np.bincount(states, minlength=levels.size)
        sums = np.bincount(states, numbers.reshape(-1), minlength=levels.size)
        levels = np.where(counts > 0, sums / np.maximum(counts, 1), levels)
    return TrellisCode(bits, levels.astype(np.float32))


def encode_alone(code: TrellisCode, numbers: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Encode numbers (R, T) without gains and weights, on MLX's default device; returns states and levels (R, T)."""
    xp = array_module()
    x = xp.array(numbers)
    states, levels = code.encode(xp, x, xp.ones_like(x), xp.ones_like(x))
    return np.array(states), np.array(levels)


# ---- the search on NumPy, which defines the results


def cuts(tokens: int) -> list[slice]:
    count = -(-tokens // LENGTH)
    return [slice(i * tokens // count, (i + 1) * tokens // count) for i in range(count)]


def _tail_biting(code: TrellisCode, *string: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Search twice: begun in the middle and without a fixed start, for the state at the end; then begun from there."""
    half = string[0].shape[1] // 2
    rotated = _search(code, None, *(np.roll(x, -half, axis=1) for x in string))
    return _search(code, rotated[:, -half - 1], *string)


def _search(
    code: TrellisCode,
    ends: NDArray[np.uint16] | None,
    target: NDArray[np.float32],
    gain: NDArray[np.float32],
    weight: NDArray[np.float32],
) -> NDArray[np.uint16]:
    """Return the cheapest states (R, T) of strings (R, T). ``ends``: (R,), the state before the first and of the last.

    The states before state s are those whose last bits are the first ones of s: all p above s >> bits.
    """
    rows, tokens = target.shape
    before, every = 1 << code.bits, np.arange(rows)
    cost = np.zeros((rows, code.table.size), np.float32)
    if ends is not None:
        cost += np.float32(1e30)
        cost[every, ends] = 0
    came_from = []
    for t in range(tokens):
        by_past = cost.reshape(rows, before, -1)
        came_from.append(by_past.argmin(axis=1))
        error = gain[:, t, None] * code.table - target[:, t, None]
        cost = np.repeat(by_past.min(axis=1), before, axis=1) + weight[:, t, None] * error * error
    state = cost.argmin(axis=1) if ends is None else ends.astype(np.int64)
    states = np.empty((rows, tokens), np.uint16)
    for t in reversed(range(tokens)):
        states[:, t] = state
        suffix = state >> code.bits
        state = came_from[t][every, suffix] * (code.table.size >> code.bits) + suffix
    return states


# ---- the same on CUDA: a warp for each string, costs and survivors in shared memory

SOURCE = """
const int tokens = sizes[0], strings = sizes[1], bits = sizes[2], states = sizes[3];
const int befores = 1 << bits, suffixes = states >> bits, lane = threadIdx.x;
const int string = blockIdx.x % strings, begin = string * tokens / strings;
const int count = (string + 1) * tokens / strings - begin, base = blockIdx.x / strings * tokens + begin;
extern __shared__ float memory[];
float* cost = memory;
float* cheapest = cost + states;
float* levels = cheapest + suffixes;
float* numbers = levels + states;  // targets, gains, weights
float* ends_cost = numbers + 3 * LENGTH;
int* ends = (int*)(ends_cost + THREADS);
unsigned char* came_from = (unsigned char*)(ends + THREADS);
for (int s = lane; s < states; s += THREADS) levels[s] = table[s];
for (int t = lane; t < count; t += THREADS) {
  numbers[t] = target[base + t];
  numbers[LENGTH + t] = gain[base + t];
  numbers[2 * LENGTH + t] = weight[base + t];
}
int end = -1;
for (int pass = 0; pass < 2; ++pass) {
  const int first = pass ? 0 : count / 2;
  __syncthreads();
  for (int s = lane; s < states; s += THREADS) cost[s] = pass && s != end ? 1e30f : 0.0f;
  __syncthreads();
  for (int i = 0; i < count; ++i) {
    const int t = i + first < count ? i + first : i + first - count;
    for (int q = lane; q < suffixes; q += THREADS) {
      float least = cost[q];
      int which = 0;
      for (int p = 1; p < befores; ++p) {
        const float other = cost[p * suffixes + q];
        if (other < least) { least = other; which = p; }
      }
      cheapest[q] = least;
      came_from[t * suffixes + q] = which;
    }
    __syncthreads();
    const float x = numbers[t], g = numbers[LENGTH + t], w = numbers[2 * LENGTH + t];
    for (int s = lane; s < states; s += THREADS) {
      const float error = g * levels[s] - x;
      cost[s] = cheapest[s >> bits] + w * error * error;
    }
    __syncthreads();
  }
  if (!pass) {
    int own = lane;
    for (int s = lane; s < states; s += THREADS) if (cost[s] < cost[own]) own = s;
    ends[lane] = own;
    ends_cost[lane] = cost[own];
    __syncthreads();
    int best = 0;
    for (int other = 1; other < THREADS; ++other) if (ends_cost[other] < ends_cost[best]) best = other;
    int s = ends[best];
    for (int i = count - 1; i > count - 1 - first; --i) {
      const int q = s >> bits, t = i + first < count ? i + first : i + first - count;
      s = came_from[t * suffixes + q] * suffixes + q;
    }
    end = s;
  } else if (lane == 0) {
    int s = end;
    for (int t = count - 1; t >= 0; --t) {
      chosen[base + t] = s;
      chosen_levels[base + t] = levels[s];
      const int q = s >> bits;
      s = came_from[t * suffixes + q] * suffixes + q;
    }
  }
}
"""


@functools.cache
def _kernel(shared_memory: int) -> Any:
    return mx.fast.cuda_kernel(
        name="trellis_search",
        input_names=["target", "gain", "weight", "table", "sizes"],
        output_names=["chosen", "chosen_levels"],
        header=f"#define LENGTH {LENGTH}\n#define THREADS {THREADS}\n",
        source=SOURCE,
        shared_memory=shared_memory,
    )


def _encode_on_gpu(code: TrellisCode, target: mx.array, gain: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
    (rows, tokens), states = target.shape, code.table.size
    suffixes, strings = states >> code.bits, len(cuts(tokens))
    kernel = _kernel(4 * (2 * states + suffixes + 3 * LENGTH + 2 * THREADS) + LENGTH * suffixes)
    found: tuple[mx.array, mx.array] = kernel(
        inputs=[target, gain, weight, mx.array(code.table), mx.array([tokens, strings, code.bits, states])],
        grid=(rows * strings * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[target.shape, target.shape],
        output_dtypes=[mx.uint16, mx.float32],
    )
    return found


def main() -> None:
    """Print the mean squared error of normal numbers in trained codes, and how long the search takes."""
    xp = array_module()
    numbers = np.random.default_rng(9).normal(size=(90, 3780)).astype(np.float32)
    given = (xp.array(numbers), *(xp.ones(numbers.shape, dtype=xp.float32) for _ in range(2)))
    for bits, log_states in ((4, 6), (4, 8), (4, 9), (4, 10), (3, 8), (3, 9), (2, 6), (2, 8), (2, 9)):
        code, times = trained_code(bits, log_states), []
        for _ in range(3):
            started = time.perf_counter()
            levels = np.array(code.encode(xp, *given)[1])
            times.append(time.perf_counter() - started)
        error, each = np.square(levels - numbers).mean(), 1e9 * min(times) / numbers.size
        print(f"{bits} bits, {1 << log_states} levels: error {error:.4f}, {each:.1f} ns a number", flush=True)


if __name__ == "__main__":
    main()
