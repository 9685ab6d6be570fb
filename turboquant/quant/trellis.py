"""Keys and values in trellis codes: their levels, the order of their bits in memory, and how they are chosen.

``BLOCK`` tokens are coded together, and stand in memory together. In the rotated basis, each coordinate of a block has
a string of bits along the tokens: one of 128 numbers for keys, two of 64 for values. viterbi.py says what a trellis
code is, and finds strings. Rotation, scales and means are those of scalar codes (codec.py).

The order of bits suits kernels that look up two levels at a time. A *lane* holds 16 tokens of two strings. Lanes are
numbered 4 g + c, with g of 8 and c of 4, for each of head_dim / 8 rows j:

- Keys: the strings of coordinates 8 j + 2 c and 8 j + 2 c + 1, of the tokens from 16 g on.
- Values: the two strings of coordinate 8 j + g. One has the tokens from 32 c on, the other those from 32 c + 16 on.

The bits of a lane are those of its tokens in order, of each token the highest bit of both strings first. They fill
``bits`` words, low bits first. In memory, a row has the first two words of each lane, and then the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.quant import viterbi
from turboquant.quant.codec import Codec, Encoded, signed_scales
from turboquant.quant.rounding import RoundingMetric
from turboquant.quant.viterbi import NODE_BITS, TrellisCode
from turboquant.runtime.device import array_module, as_float32

BLOCK = 128  # tokens
LANE_TOKENS = 16
PAIRS = 32  # coordinates of keys in a run: those of 16 first strings are searched, then those of 16 second ones
SWEEPS = 1  # of coordinate descent, after rounding with feedback
ATTENTION_POWER = 0.25  # of squared attention, by which the errors of tokens are weighted
LEAST_ATTENTION = 0.01  # share of the mean that is added to a token's squared attention, so that all tokens count
LARGEST_ROOT = 8.0  # of a weight, relative to its block's mean
Choose = Callable[["TrellisCodec", mx.array, mx.array, RoundingMetric | None], tuple[mx.array, mx.array]]

# Levels of the rows, trained on normal numbers by ``benches.trellis_levels``, by bits and masks of parities. At 4 bits,
# the two strings of a pair have different masks: a decoder then finds both parities at once.
_TRAINED = {
    (4, (16,)): (
        "-2.912 -2.293 -1.896 -1.593 -1.358 -1.163 -1.01 -0.866 -0.7524 -0.634 -0.522 -0.4236 -0.3193 -0.2402 "
        "-0.1207 -0.05716 0.05573 0.1189 0.2399 0.3157 0.4248 0.52 0.632 0.753 0.8657 1.01 1.165 1.358 1.593 "
        "1.896 2.299 2.914"
    ),
    (4, (1,)): (
        "-2.914 -2.291 -1.894 -1.593 -1.358 -1.168 -1.014 -0.8696 -0.7554 -0.635 -0.524 -0.426 -0.32 -0.2405 "
        "-0.1257 -0.0523 0.0504 0.1261 0.2377 0.3193 0.4258 0.5244 0.6353 0.7544 0.8706 1.013 1.169 1.363 1.596 "
        "1.896 2.299 2.914"
    ),
    (3, (1, 24)): (
        "-2.691 -2.062 -1.711 -1.497 -1.293 -1.166 -0.969 -0.9326 -0.711 -0.694 -0.5015 -0.5 -0.2783 -0.2722 "
        "-0.1147 -0.1096 0.10895 0.11035 0.2605 0.2795 0.503 0.498 0.6875 0.7124 0.929 0.965 1.171 1.273 1.499 "
        "1.7 2.066 2.715"
    ),
    (2, (5, 7, 25)): (
        "-2.377 -1.765 -1.496 -1.509 -1.048 -1.045 -1.006 -1.012 -0.58 -0.596 -0.4866 -0.4778 -0.2332 -0.2141 "
        "-0.1897 -0.1873 0.1921 0.1941 0.2275 0.217 0.4766 0.4731 0.592 0.582 1.014 1.018 1.03 1.015 1.51 1.518 "
        "1.698 2.361"
    ),
}


def _code(bits: int, *parities: int) -> TrellisCode:
    levels = np.array(_TRAINED[bits, parities].split(), np.float16).reshape(1 << bits, 1 << len(parities))
    return TrellisCode(bits, levels.astype(np.float32), parities)


_FIRST = {4: _code(4, 16), 3: _code(3, 1, 24), 2: _code(2, 5, 7, 25)}
# The codes of the first and the second string of a pair, by bits.
CODES = {bits: (first, _code(4, 1) if bits == 4 else first) for bits, first in _FIRST.items()}


@dataclass(frozen=True)
class TrellisCodec(Codec):
    """Compress the keys, or the values, of ``BLOCK`` tokens at a time by trellis codes, in as many bits as ``Codec``.

    A block gets the same codes whichever blocks are encoded with it. Raises ValueError for bits and head_dims that
    ``has_code`` does not name.

    >>> x = mx.random.normal((2, BLOCK, 64))
    >>> codec = TrellisCodec(64, 2)
    >>> encoded = codec.encode(x)
    >>> encoded.nbytes == Codec(64, 2).encode(x).nbytes
    True
    >>> float(mx.square(codec.decode(encoded) - x).mean()) < 0.09
    True
    """

    of: Literal["keys", "values"] = "keys"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not has_code(self.head_dim, self.bits):
            raise ValueError(f"there is no trellis code of {self.bits} bits for a head_dim of {self.head_dim}")

    def rounding_metric(self, metric: Any, kernel: Callable[[Any], Any] | None = None) -> RoundingMetric:
        """Prepare a metric (H, head_dim, head_dim) for ``encode``, see ``Codec``."""
        arranged = _first_strings_first(self._rotated(metric), 1)
        return RoundingMetric.prepare(array_module(), _first_strings_first(arranged, 2), kernel)

    def encode(
        self,
        x: mx.array,
        mean: mx.array | None = None,
        metric: RoundingMetric | None = None,
        weights: mx.array | None = None,
        choose: Choose | None = None,
    ) -> Encoded:
        """Compress x (H, T, head_dim), any float dtype; ``BLOCK`` divides T.

        mean, metric: as of ``Codec.encode``; a metric is for keys.
        weights: (H, T), by which the squared errors of tokens count beside their squared lengths.
        choose: a kernel that does what the method ``choose`` does.
        """
        if x.shape[-1] != self.head_dim or x.shape[1] % BLOCK:
            raise ValueError(f"{x.shape[1:]} numbers given to a codec for (n * {BLOCK}, {self.head_dim})")
        if x.size == 0:
            return super().encode(x)
        unit, norm, is_centred = self.normalise(x, mean)
        unit, root = unit.swapaxes(1, 2), relative_to_blocks(norm if weights is None else norm * mx.sqrt(weights))
        if choose is not None:
            words, factors = choose(self, unit, root, metric)
        else:
            xp = array_module()
            coordinates, root = (as_float32(xp, mx.contiguous(one)) for one in (unit, root))
            words, factors = map(mx.array, self.choose(xp, coordinates, root, metric))
        return Encoded(words, signed_scales(norm * factors, is_centred))

    def choose(self, xp: Any, unit: Any, root: Any, metric: RoundingMetric | None) -> tuple[Any, Any]:
        """Choose the strings of unit (H, dim, T), rotated vectors of norm sqrt(dim).

        root: (H, T), roots of weights. Returns the words of blocks (H, T, words) uint32 and factors of levels (H, T).
        """
        lanes, factors = (self._choose_keys if self.of == "keys" else self._choose_values)(xp, unit, root, metric)
        return _pack(xp, lanes, self.bits), factors

    def decode_rotated(self, encoded: Encoded) -> mx.array:
        """Reconstruct vectors (H, T, head_dim) float32 in the rotated basis, without adding the mean."""
        levels: mx.array = self.decode_levels(mx, encoded.codes)
        return levels * mx.abs(encoded.scales.astype(mx.float32))[..., None]

    def decode_levels(self, xp: Any, words: Any) -> Any:
        """Decode the words of blocks (H, T, words) to levels (H, T, head_dim) float32, without applying scales."""
        heads, tokens, _ = words.shape
        bits, reach = self.bits, 2 * (NODE_BITS + self.bits)
        rows = words.reshape(heads, tokens // BLOCK, self.head_dim // 8, 32 * bits)
        stream = []
        for first in range(0, bits, 2):
            some = rows[..., 32 * first : 32 * (first + 2)].reshape(*rows.shape[:3], 8, 4, -1)
            stream += [some[..., i] for i in range(some.shape[-1])]
        stream.insert(0, xp.roll(stream[-1], 1, 3 if self.of == "keys" else 4))
        table, found = xp.array(_pairs_of_levels(bits)), []
        for i in range(LANE_TOKENS):
            word, shift = divmod(32 + 2 * bits * (i + 1) - reach, 32)
            window = stream[word] >> shift
            if shift + reach > 32:
                window = window | stream[word + 1] << (32 - shift)
            pairs = xp.take(table, window & ((1 << reach) - 1)).view(xp.float32)  # (H, blocks, rows, g, c * strings)
            if self.of == "keys":
                found.append(pairs.transpose(0, 1, 3, 2, 4))
            else:
                found.append(pairs.reshape(*pairs.shape[:-1], 4, 2).transpose(0, 1, 4, 5, 2, 3))
        levels = xp.stack(found, axis=3 if self.of == "keys" else 4)
        return levels.reshape(heads, tokens, self.head_dim)

    def _choose_keys(self, xp: Any, unit: Any, root: Any, metric: RoundingMetric | None) -> tuple[Any, Any]:
        """Choose strings for unit (H, dim, T); returns the codes of lanes, see ``_pack``, and factors (H, T)."""
        heads, dim, tokens = unit.shape
        unit = _first_strings_first(unit, 1)
        if metric is None:
            one = xp.ones_like(root)
            found = [
                viterbi.search(self._code(start), unit[:, start : start + PAIRS // 2], one, root, BLOCK)
                for start in range(0, dim, PAIRS // 2)
            ]
            states, levels = (xp.concatenate(list(parts), axis=1) for parts in zip(*found, strict=True))
            factors = _norm_of(xp, unit) / _norm_of(xp, levels)
        else:
            states, factors = self._round_keys(xp, unit, root, metric)
        # (heads, m, strings, q, c, blocks, g, tokens): coordinate 32 m + 8 q + 2 c is in row 4 m + q
        parts = states.reshape(heads, -1, 2, 4, 4, tokens // BLOCK, 8, LANE_TOKENS)
        lanes = parts.transpose(0, 5, 1, 3, 6, 4, 7, 2).reshape(heads, -1, dim // 8, 32, LANE_TOKENS, 2)
        return lanes, factors

    def _choose_values(self, xp: Any, unit: Any, root: Any, metric: RoundingMetric | None) -> tuple[Any, Any]:
        """Do what ``_choose_keys`` does, for values; there is no metric for them."""
        heads, dim, _ = unit.shape
        parts = unit.reshape(heads * dim // 16, 16, -1, 4, 2, LANE_TOKENS)
        roots = xp.repeat(root, dim // 16, axis=0).reshape(heads * dim // 16, -1, 4, 2, LANE_TOKENS)
        states, levels = [], []
        for string, code in enumerate(CODES[self.bits]):
            target = parts[..., string, :].reshape(heads * dim // 16, 16, -1)
            weight = roots[..., string, :].reshape(target.shape[0], -1)
            found = viterbi.search(code, target, xp.ones_like(weight), weight, BLOCK // 2)
            states.append(found[0].reshape(heads, dim // 8, 8, -1, 4, LANE_TOKENS))
            levels.append(found[1].reshape(heads, dim, -1, 4, LANE_TOKENS))
        factors = _norm_of(xp, unit) / _norm_of(xp, xp.stack(levels, axis=-2).reshape(unit.shape))
        lanes = xp.stack(states, axis=-1).transpose(0, 3, 1, 2, 4, 5, 6)
        return lanes.reshape(*lanes.shape[:3], 32, LANE_TOKENS, 2), factors

    def _round_keys(self, xp: Any, unit: Any, root: Any, metric: RoundingMetric) -> tuple[Any, Any]:
        """Do what ``rounding.round_in_metric`` does, with strings. Returns states (H, dim, T) and factors (H, T)."""
        scaled, one = metric.damped @ unit, xp.ones_like(root)
        states, levels = self._sweep(xp, unit, xp.zeros_like(unit), metric.factor, one, root, None)
        for _ in range(SWEEPS):
            best = _products(levels, scaled) / _products(levels, metric.damped @ levels)
            scale = xp.clip(best, 0.5, 2.0)
            error = scale[:, None] * levels - unit
            states, levels = self._sweep(xp, unit, error, metric.pull, scale, root, states)
        factors = _products(unit, scaled) / xp.maximum(_products(levels, scaled), 1e-9)
        return states, xp.clip(factors, 0.5, 2.0)

    def _sweep(self, xp: Any, unit: Any, error: Any, pull: Any, scale: Any, root: Any, former: Any) -> tuple[Any, Any]:
        """Choose strings coordinate by coordinate, each by how far ``pull`` and the errors of all others move it.

        unit: (H, dim, T). error: (H, dim, T), the errors before; they are replaced by those after. scale: (H, T).
        former: the states before, or None: then the last coordinate comes first. Returns states and levels (H, dim, T).
        """
        down, step, found = former is None, PAIRS // 2, {}
        for start in range(0, unit.shape[1], step)[:: -1 if down else 1]:
            some = slice(start, start + step)
            target = unit[:, some] - pull[:, some] @ error
            others = pull[:, some, some], unit[:, some], error[:, some]
            before = None if former is None else former[:, some]
            found[start] = viterbi.search(self._code(start), target, scale, root, BLOCK, others, down, before)
            error[:, some] = scale[:, None] * found[start][1] - unit[:, some]
        states, levels = zip(*(found[start] for start in sorted(found)), strict=True)
        return xp.concatenate(list(states), axis=1), xp.concatenate(list(levels), axis=1)

    def _code(self, coordinate: int) -> TrellisCode:
        """Return the code of a coordinate of keys, in the order of ``_first_strings_first``."""
        return CODES[self.bits][coordinate // (PAIRS // 2) % 2]


def relative_to_blocks(roots: mx.array) -> mx.array:
    """Divide the roots of weights (H, T) by their block's mean, because costs of strings are halves (float16)."""
    blocks = mx.minimum(roots, 1e30).reshape(roots.shape[0], -1, BLOCK)  # finite, as sums are
    means = mx.maximum(blocks.mean(axis=-1, keepdims=True), 1e-30)
    return mx.minimum(blocks / means, LARGEST_ROOT).reshape(roots.shape)


def attention_weights(attention: Any) -> Any:
    """Return weights (H, T) for ``TrellisCodec.encode``, from the squared attention that a context's tokens get."""
    mean = attention.mean(axis=1, keepdims=True) + 1e-30  # zero where no token is far enough from a query to count
    return (attention / mean + LEAST_ATTENTION) ** ATTENTION_POWER


def has_code(head_dim: int, bits: int) -> bool:
    """Return whether there is a trellis code of ``bits`` bits for vectors of ``head_dim`` coordinates."""
    return bits in CODES and head_dim % PAIRS == 0


@functools.cache
def digest() -> str:
    """Return a digest of the levels, which decide all codes."""
    content = b"".join(code.table.astype("<f2").tobytes() for pair in CODES.values() for code in pair)
    return sha256(content).hexdigest()[:8]


def _first_strings_first(x: Any, axis: int) -> Any:
    """In each run of ``PAIRS`` coordinates along an axis, put the even ones before the odd ones."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    return x.reshape(*before, -1, PAIRS // 2, 2, *after).swapaxes(axis + 1, axis + 2).reshape(x.shape)


def _pack(xp: Any, lanes: Any, bits: int) -> Any:
    """Pack the codes of lanes into the words of blocks.

    lanes: (H, blocks, dim / 8, 32, LANE_TOKENS, 2); of states, the lowest bits are used.
    Returns (H, blocks * BLOCK, words) uint32.
    """
    one, two = (lanes[..., string].astype(xp.uint32) for string in (0, 1))
    pairs: Any = 0
    for k in range(bits):
        shift = bits - 1 - k
        pairs = pairs | (one >> shift & 1) << 2 * k | (two >> shift & 1) << (2 * k + 1)
    words: list[Any] = [0] * bits
    for i in range(LANE_TOKENS):
        word, shift = divmod(2 * bits * i, 32)
        words[word] = words[word] | pairs[..., i] << shift
        if shift + 2 * bits > 32:
            words[word + 1] = words[word + 1] | pairs[..., i] >> (32 - shift)
    row = (*lanes.shape[:3], -1)
    parts = [xp.stack(words[i : i + 2], axis=-1).reshape(row) for i in range(0, bits, 2)]
    return xp.concatenate(parts, axis=-1).reshape(lanes.shape[0], lanes.shape[1] * BLOCK, -1)


@functools.cache
def _pairs_of_levels(bits: int) -> NDArray[np.complex64]:
    """Return the levels of two strings, (4**log_states,), by the last bits of both, the oldest lowest.

    Two levels are a complex number, so that one look-up gives both.
    """
    codes = CODES[bits]
    windows = np.arange(1 << 2 * codes[0].log_states)
    states = [np.zeros_like(windows), np.zeros_like(windows)]
    for i in range(2 * codes[0].log_states):
        states[i % 2] = states[i % 2] << 1 | windows >> i & 1
    first, second = (code.table[state] for code, state in zip(codes, states, strict=True))
    return first + np.complex64(1j) * second


def _products(one: Any, other: Any) -> Any:
    """Return the scalar products of vectors (H, dim, T), (H, T)."""
    return (one * other).sum(axis=1)


def _norm_of(xp: Any, x: Any) -> Any:
    """Return the norms of vectors (H, dim, T), (H, T)."""
    return xp.sqrt((x * x).sum(axis=1))
