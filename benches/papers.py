"""Newer methods, re-implemented from their papers, beside this package's codes: emulated, on the same contracts.

    python -m benches.papers --model SMOLLM2 --data CUAD --tokens 4000 --contracts 10 --questions 6

OSCAR (arXiv 2605.17757), KVarN (arXiv 2606.03458) and Block-GTQ (arXiv 2606.24033); the docstring of each says what it
does, and what was chosen where there is a choice. Details that abstracts and summaries of the papers leave open are
those of the authors' public code, for KVarN of a fork of it. Contracts and questions are those of contracts.py. Each
method encodes keys and values of a context read in full precision, and the decoded ones are attended in float32.
Questions and answers stay in full precision, as behind a prefix. What needs calibration gets the contracts that follow
the measured ones. All bits of a context are counted: codes, scales, zero points, norms, and tokens kept in 16 bits.
Tables that belong to the model (rotations, allocations) are not.

The cache has positional encoding applied to its keys, and all three methods encode such keys.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from turboquant.runtime.blas import load_tuned_blas

if __name__ == "__main__":
    load_tuned_blas()  # before anything imports NumPy or MLX

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from benches.contracts import contract_samples, measure_contracts
from turboquant.fidelity import load_model, table
from turboquant.quant import SUPPORTED_BITS
from turboquant.quant.codebook import lloyd_max
from turboquant.quant.layer import DenseLayer

if TYPE_CHECKING:
    from turboquant.eval.results import Baseline, Filled, Sample
    from turboquant.eval.teacher_forcing import Context

NUMBER = 16  # bits of a scale, a zero point, a norm, or a coordinate in full precision
SINKS = 16  # first tokens in full precision of every method, as in the codec, unless it has its paper's
SAMPLED = 256  # tokens of each calibration context on which OSCAR's clipping is chosen
CLIPS = (0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.98, 1.0)  # quantiles that OSCAR's clipping is chosen from
EVEN = (4, 3, 2)


@dataclass(frozen=True)
class Window:
    """How many of the first and of the last tokens of a context are kept in 16 bits."""

    first: int = 0
    last: int = 0


class Method(Protocol):
    """A way to encode the keys and values of a layer.

    tile: how many tokens are encoded together; what is left over at the end of a context is kept in 16 bits.
    """

    name: str
    key_bits: int
    value_bits: int
    window: Window
    tile: int

    def code(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, int]:
        """Encode and decode keys and values (n_kv_heads, T, head_dim) float32; return them and the bits they need."""


def emulated(method: Method) -> Baseline:
    """Return a baseline that replaces the keys and values of a context by those that a method encoded and decoded."""
    from turboquant.caches.prefix import Prefix
    from turboquant.eval.results import Baseline, Filled

    def fill(context: Context) -> Filled:
        layers, bits = list(context.caches), 0
        for number, index in enumerate(index for index, yes in enumerate(context.compressible) if yes):
            (keys,), (values,) = context.caches[index].keys_and_values()
            layers[index], needed = _coded_layer(method, number, keys, values)
            bits += needed
        return Filled(Prefix(tuple(layers), len(context.tokens)), math.ceil(bits / 8))

    return Baseline(method.name, method.key_bits, method.value_bits, "exact", fill)


def _coded_layer(method: Method, layer: int, keys: mx.array, values: mx.array) -> tuple[DenseLayer, int]:
    keys, values = keys.astype(mx.float32), values.astype(mx.float32)
    tokens = keys.shape[1]
    first = min(method.window.first, tokens)
    coded = max(0, tokens - first - method.window.last) // method.tile * method.tile
    if not coded:
        return DenseLayer(keys, values), NUMBER * (keys.size + values.size)
    some = slice(first, first + coded)
    found_keys, found_values, bits = method.code(layer, keys[:, some], values[:, some])
    whole = [
        mx.concatenate([x[:, :first], found, x[:, first + coded :]], axis=1)
        for x, found in ((keys, found_keys), (values, found_values))
    ]
    mx.eval(whole)
    kept = (tokens - coded) * (keys.shape[0] * keys.shape[2] + values.shape[0] * values.shape[2])
    return DenseLayer(*whole), bits + NUMBER * kept


# ---- what methods have in common


def affine_codes(x: mx.array, bits: int, axis: int) -> tuple[mx.array, int]:
    """Round to the nearest of ``2**bits`` evenly spaced numbers from the least to the greatest along an axis.

    Returns the decoded numbers and the bits they need: codes, and a scale and a zero point along the axis.
    """
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    zero, scale = half(low), half(mx.maximum(high - low, 1e-6) / (2**bits - 1))
    codes = mx.clip(mx.round((x - zero) / scale), 0, 2**bits - 1)
    return codes * scale + zero, bits * x.size + NUMBER * (scale.size + zero.size)


def half(x: mx.array) -> mx.array:
    """Round numbers as their storage in 16 bits does."""
    return x.astype(mx.float16).astype(mx.float32)


def hadamard(size: int) -> NDArray[np.float64]:
    """Return the orthogonal matrix of Sylvester's construction; ``size`` is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / math.sqrt(2)
    if len(matrix) != size:
        raise ValueError(f"{size} coordinates are not a power of two")
    return matrix


@functools.cache
def random_rotation(size: int, seed: int) -> mx.array:
    """Return an orthogonal matrix of the Haar distribution, float32."""
    matrix, triangle = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return mx.array((matrix * np.sign(np.diag(triangle))).astype(np.float32))


@functools.cache
def normal_levels(bits: int) -> NDArray[np.float64]:
    """Return the levels of N(0, 1) with the least mean squared error, for any number of bits from 1 to 8."""
    return lloyds_levels(bits) if bits not in SUPPORTED_BITS else np.asarray(lloyd_max(bits).levels, np.float64)


def lloyds_levels(bits: int) -> NDArray[np.float64]:
    """Return them by Lloyd's iteration, which is slow to find the outermost of many levels."""
    levels = np.linspace(-3, 3, 2**bits)
    for _ in range(2000):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        below = np.array([math.erfc(-edge / math.sqrt(2)) / 2 for edge in edges])
        levels = -np.diff(density) / np.diff(below)
    return levels


# ---- calibration


@dataclass(frozen=True)
class Calibration:
    """What methods learn of one layer from contexts other than those measured.

    queries: (n_kv_heads, head_dim, head_dim) float64, the mean of q q' over all queries that share a KV head.
    key_energy: (n_kv_heads, head_dim) float64, mean squares.
    weighted_values: (head_dim, head_dim) float64, the mean of v v' over heads and tokens, each weighted as OSCAR does.
    sampled_keys, sampled_values, weights: (N, head_dim) and (N,) float32, some tokens of all heads.
    """

    queries: NDArray[np.float64]
    key_energy: NDArray[np.float64]
    weighted_values: NDArray[np.float64]
    sampled_keys: mx.array
    sampled_values: mx.array
    weights: mx.array


def calibrate(model: Any, samples: Sequence[Sample], chunk: int = 512) -> list[Calibration]:
    """Read contexts in full precision, and return what they say of each compressible layer."""
    from turboquant.eval.teacher_forcing import prefill_context
    from turboquant.mlx_lm.families import explain
    from turboquant.mlx_lm.patch import enabled

    found: list[list[Calibration]] = []
    with enabled(model):
        for number, sample in enumerate(samples, 1):
            context = prefill_context(model, sample.context, list(explain(model).layers), chunk)
            caches = [cache for cache, yes in zip(context.caches, context.compressible, strict=True) if yes]
            found.append([_calibrate_layer(cache) for cache in caches])
            print(f"calibrated on {number} of {len(samples)}", file=sys.stderr, flush=True)
    return [_mean(layers) for layers in zip(*found, strict=True)]


def _calibrate_layer(cache: Any) -> Calibration:
    """The first tokens are left out, as every method keeps them in 16 bits."""
    keys, values = (x[0, :, SINKS:].astype(mx.float32) for x in cache.keys_and_values())
    heads, tokens, dim = keys.shape
    statistics = cache.queries.statistics()
    count = cache.offset * statistics.sampled.shape[0] / heads
    queries = statistics.moment / count
    weights = ((keys @ queries) * keys).sum(axis=-1)
    weights = weights / mx.maximum(weights.mean(axis=1, keepdims=True), 1e-12)
    weighted = values * mx.sqrt(weights)[..., None]
    covariance = (weighted.swapaxes(1, 2) @ weighted).mean(axis=0) / tokens
    every = slice(None, None, max(1, tokens // SAMPLED))
    samples = [keys[:, every].reshape(-1, dim), values[:, every].reshape(-1, dim), weights[:, every].reshape(-1)]
    mx.eval(samples)
    energy = mx.square(keys).mean(axis=1)
    return Calibration(*(np.array(x, np.float64) for x in (queries, energy, covariance)), *samples)  # type: ignore[arg-type]


def _mean(layers: Sequence[Calibration]) -> Calibration:
    means = [
        np.mean([getattr(x, name) for x in layers], axis=0) for name in ("queries", "key_energy", "weighted_values")
    ]
    names = ("sampled_keys", "sampled_values", "weights")
    return Calibration(*means, *(mx.concatenate([getattr(x, name) for x in layers]) for name in names))


# ---- the methods


@dataclass(frozen=True)
class Affine:
    """Plain rounding in groups of 64 coordinates of a token, each with a scale and a zero point: mlx-lm's format.

    Its own cache quantises questions too, and does not run on CUDA. Here only the context is encoded.
    """

    key_bits: int
    value_bits: int
    window: Window = Window()
    name: str = "groups of 64, no rotation"
    tile: int = 1
    group: int = 64

    def code(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, int]:
        """See ``Method``."""
        found, needed = [], 0
        for x, bits in ((keys, self.key_bits), (values, self.value_bits)):
            decoded, count = affine_codes(x.reshape(*x.shape[:2], -1, min(self.group, x.shape[2])), bits, axis=-1)
            found.append(decoded.reshape(x.shape))
            needed += count
        return found[0], found[1], needed


@dataclass(frozen=True)
class Oscar:
    """OSCAR: a rotation of each layer from covariances that attention sees, clipping, and affine codes of each token.

    Keys are rotated by the eigenvectors of the covariance of queries, values by those of the covariance of values in
    which a token counts by k' C k, where C is the queries' covariance (a stand-in for its attention, as in the authors'
    calibration); both are means over KV heads. A Hadamard matrix follows. The permutation after it is left out: it
    spreads coordinates over groups, and a head of 64 is one group here (the paper has groups of 128, a head of 128).
    The numbers of a token are clipped at a quantile of their sizes. The authors use .96 for keys and .92 for values at
    2 bits and 128 coordinates. Here quantiles are chosen on the calibration contexts for each number of bits, by the
    error of products with queries and by the weighted error of values. The paper keeps 64 first and 256 last tokens in
    16 bits.
    """

    key_bits: int
    value_bits: int
    layers: Sequence[tuple[mx.array, mx.array]]  # the rotations of keys and of values
    clips: tuple[float, float]
    window: Window = Window(64, 256)
    name: str = "OSCAR"
    tile: int = 1

    @staticmethod
    def calibrated(key_bits: int, value_bits: int, calibrations: Sequence[Calibration]) -> Oscar:
        """Take rotations and clipping from calibration."""
        layers = [(_spectral(x.queries.mean(axis=0)), _spectral(x.weighted_values)) for x in calibrations]
        losses = np.zeros((2, len(CLIPS)))
        for calibration, rotations in zip(calibrations, layers, strict=True):
            metric = mx.array(calibration.queries.mean(axis=0).astype(np.float32))
            keys, values, weights = calibration.sampled_keys, calibration.sampled_values, calibration.weights[:, None]
            for row, x, bits in ((0, keys, key_bits), (1, values, value_bits)):
                errors = [clipped_codes(x, rotations[row], bits, clip)[0] - x for clip in CLIPS]
                sizes = [((e @ metric) * e).sum() if row == 0 else (weights * e * e).sum() for e in (*errors, x)]
                losses[row] += np.array([float(size / sizes[-1]) for size in sizes[:-1]])
        clips = [CLIPS[int(loss.argmin())] for loss in losses]
        print(f"OSCAR {key_bits}/{value_bits} clips at {clips}", file=sys.stderr, flush=True)
        return Oscar(key_bits, value_bits, layers, (clips[0], clips[1]))

    def code(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, int]:
        """See ``Method``."""
        of_keys, of_values = self.layers[layer]
        found_keys, needed = clipped_codes(keys, of_keys, self.key_bits, self.clips[0])
        found_values, more = clipped_codes(values, of_values, self.value_bits, self.clips[1])
        return found_keys, found_values, needed + more


def _spectral(covariance: NDArray[np.float64]) -> mx.array:
    _, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return mx.array((vectors @ hadamard(len(vectors))).astype(np.float32))


def clipped_codes(x: mx.array, rotation: mx.array, bits: int, clip: float) -> tuple[mx.array, int]:
    """Rotate vectors (..., dim), clip each at a quantile of the sizes of its numbers, code it and rotate it back."""
    rotated = x @ rotation
    place = min(int(clip * x.shape[-1]), x.shape[-1] - 1)
    most = mx.sort(mx.abs(rotated), axis=-1)[..., place : place + 1]
    decoded, needed = affine_codes(mx.clip(rotated, -most, most), bits, axis=-1)
    return decoded @ rotation.T, needed


@dataclass(frozen=True)
class KVarN:
    """KVarN: a Hadamard matrix, variances of tokens and channels made equal, and affine codes, without calibration.

    It encodes tiles of 128 tokens. Standard deviations of tokens and of channels are divided out in turn, 16 times, and
    the scales of the most even tile are used. Keys have affine codes along the tokens of a channel, values along the
    channels of a token. The bounds that the authors' code sets on scales are left out, as they suppose large numbers.
    The authors keep the first 128 tokens in 16 bits, and what does not fill a tile. Their preset is 4/2.
    """

    key_bits: int
    value_bits: int
    window: Window = Window(128, 0)
    name: str = "KVarN"
    tile: int = 128
    rounds: int = 16

    def code(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, int]:
        """See ``Method``."""
        found, needed = [], 0
        for x, bits, along in ((keys, self.key_bits, -2), (values, self.value_bits, -1)):
            rotation = mx.array(hadamard(x.shape[-1]).astype(np.float32))
            tiles, scales = (x @ rotation).reshape(x.shape[0], -1, self.tile, x.shape[-1]), mx.array(1.0)
            if self.rounds:
                # Of channels' scales for keys, and of tokens' for values, nothing is left to store: affine codes along
                # the other axis have a scale for each of them anyway, and choose the same codes.
                scales = even_scales(tiles, self.rounds)[0 if along == -2 else 1]
                scales = half(scales / mx.exp(mx.log(scales).mean(axis=(-1, -2), keepdims=True)))
                needed += NUMBER * scales.size
            decoded, count = affine_codes(tiles / scales, bits, axis=along)
            found.append((decoded * scales).reshape(x.shape) @ rotation.T)
            needed += count
        return found[0], found[1], needed


def even_scales(tiles: mx.array, rounds: int) -> tuple[mx.array, mx.array]:
    """Return scales of tokens (..., T, 1) and channels (..., 1, dim) of tiles (..., T, dim).

    Divided by both, a tile has tokens and channels of nearly equal standard deviations. Of all rounds, the scales are
    returned for which the greatest is nearest to the least.
    """

    of_tokens, of_channels = mx.ones_like(tiles[..., :1]), mx.ones_like(tiles[..., :1, :])
    best, least = (of_tokens, of_channels), _unevenness(tiles)
    for _ in range(rounds):
        of_channels = of_channels * _deviations(tiles / of_tokens / of_channels, -2)
        of_tokens = of_tokens * _deviations(tiles / of_tokens / of_channels, -1)
        now = _unevenness(tiles / of_tokens / of_channels)
        better = now <= least
        best = mx.where(better, of_tokens, best[0]), mx.where(better, of_channels, best[1])
        least = mx.minimum(now, least)
        mx.eval(best, least)
    return best


def _deviations(x: mx.array, axis: int) -> mx.array:
    return mx.maximum(mx.sqrt(mx.var(x, axis=axis, keepdims=True, ddof=1)), 1e-8)


def _unevenness(x: mx.array) -> mx.array:
    of_tokens, of_channels = _deviations(x, -1), _deviations(x, -2)
    tokens = of_tokens.max(axis=-2, keepdims=True) / of_tokens.min(axis=-2, keepdims=True)
    return tokens + of_channels.max(axis=-1, keepdims=True) / of_channels.min(axis=-1, keepdims=True)


@dataclass(frozen=True)
class BlockGtq:
    """Block-GTQ: TurboQuant's codes, with more bits for the rotary pairs of keys that have more energy.

    The score of a pair of coordinates is the mean energy of queries and keys in it, of each layer and KV head. Bits are
    given one by one, each to the pair with the greatest score / 4**bits, from 1 to 8 for a number, ``key_bits`` on
    average. Pairs of equal bits form a group with a random rotation, Lloyd-Max levels and a norm in 16 bits for each
    token, to which its decoded numbers are scaled. Values are one group. Pairs are coordinates i and i + dim / 2, as
    mlx-lm rotates them in most families. The paper keeps no tokens in 16 bits, or 4 first and 128 last ones.
    """

    key_bits: int
    value_bits: int
    layers: Sequence[Sequence[NDArray[np.int64]]]  # the bits of the pairs, of each layer and head
    window: Window = Window(4, 128)
    name: str = "Block-GTQ"
    tile: int = 1

    @staticmethod
    def calibrated(key_bits: int, value_bits: int, calibrations: Sequence[Calibration]) -> BlockGtq:
        """Take the allocation of bits from calibration."""
        layers = []
        for x in calibrations:
            energy = np.diagonal(x.queries, axis1=1, axis2=2) + x.key_energy
            layers.append([allocated(head.reshape(2, -1).sum(axis=0) / 2, key_bits) for head in energy])
        return BlockGtq(key_bits, value_bits, layers)

    def code(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, int]:
        """See ``Method``."""
        found, needed = [], 0
        for head, pairs in enumerate(self.layers[layer]):
            groups = {int(bits): np.flatnonzero(np.tile(pairs == bits, 2)) for bits in np.unique(pairs)}
            parts = [norm_and_levels(keys[head][:, mx.array(some)], bits) for bits, some in groups.items()]
            back = np.argsort(np.concatenate(list(groups.values())))
            found.append(mx.concatenate([part for part, _ in parts], axis=-1)[:, mx.array(back)])
            needed += sum(count for _, count in parts)
        found_values, count = norm_and_levels(values, self.value_bits)
        return mx.stack(found), found_values, needed + count


def allocated(scores: NDArray[np.float64], average: float, fewest: int = 1, most: int = 8) -> NDArray[np.int64]:
    """Return the bits of each pair: the next bit always goes where it lowers score / 4**bits most."""
    bits = np.full(len(scores), fewest)
    for _ in range(int(average * len(scores)) - bits.sum()):
        bits[np.where(bits < most, scores / 4.0**bits, -1.0).argmax()] += 1
    return bits


def norm_and_levels(x: mx.array, bits: int) -> tuple[mx.array, int]:
    """Code vectors (..., dim) as TurboQuant does: a norm in 16 bits, a random rotation, nearest Lloyd-Max levels."""
    dim, levels = x.shape[-1], normal_levels(bits)
    rotation = random_rotation(dim, bits)
    norm = mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    unit = (x / norm) @ rotation * math.sqrt(dim)
    boundaries = mx.array(((levels[1:] + levels[:-1]) / 2).astype(np.float32))
    codes = (unit[..., None] > boundaries).sum(axis=-1)
    found = mx.array(levels.astype(np.float32))[codes]
    found = found / mx.linalg.norm(found, axis=-1, keepdims=True) @ rotation.T
    return found * half(norm), bits * x.size + NUMBER * norm.size


# ---- the table


def rows(calibrations: Sequence[Calibration], codings: Sequence[str]) -> list[Baseline]:
    """Return this package's codes, plain rounding, and the methods: with the codec's sinks, and with their own windows.

    At 2 bits there is also each method without the idea that is its own.
    """
    from turboquant.eval.baselines import exact
    from turboquant.quant.cache_codec import CacheCodec

    ours = [exact(CacheCodec(bits, bits, coding=coding)) for coding in codings for bits in EVEN]
    oscars = {bits: Oscar.calibrated(bits, bits, calibrations) for bits in EVEN}
    kvarns = [KVarN(*pair) for pair in ((4, 4), (3, 3), (4, 2), (2, 2))]
    gtqs = {bits: BlockGtq.calibrated(bits, bits, calibrations) for bits in EVEN}
    methods: list[Any] = [*oscars.values(), *kvarns, *gtqs.values()]
    own = [one for one in methods if one.value_bits <= 3]  # with as many bits as the others with a bit more
    plain = mx.array(hadamard(oscars[2].layers[0][0].shape[0]).astype(np.float32))
    without = [
        replace(oscars[2], name="OSCAR, Hadamard alone", layers=[(plain, plain)] * len(calibrations)),
        replace(kvarns[-1], name="KVarN, variances as they are", rounds=0),
        replace(
            gtqs[2], name="Block-GTQ, equal bits", layers=[[np.full_like(x, 2) for x in y] for y in gtqs[2].layers]
        ),
    ]
    alike = [replace(one, window=Window(SINKS)) for one in (*methods, *without)]
    own = [replace(one, name=f"{one.name}, {one.window.first} + {one.window.last} in 16 bits") for one in own]
    return ours + [emulated(one) for one in (Affine(4, 4), Affine(2, 2), *alike, *own)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure methods re-implemented from their papers.")
    parser.add_argument("--model", required=True, help="a model folder with a chat template")
    parser.add_argument("--data", required=True, type=Path, help="the folder of contracts and questions")
    parser.add_argument("--tokens", type=int, default=4000, help="length of the contexts")
    parser.add_argument("--longest", type=int, default=7500, help="use only contracts of so many tokens or more")
    parser.add_argument("--contracts", type=int, default=10)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument(
        "--calibration", type=int, default=10, help="the next contracts, for the methods that need some"
    )
    parser.add_argument("--codings", nargs="*", default=["scalar", "trellis"], help="this package's, to compare with")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    model.set_dtype(mx.float32)
    contracts = arguments.contracts + arguments.calibration
    samples = contract_samples(
        tokenizer, arguments.data, arguments.tokens, arguments.longest, contracts, arguments.questions
    )
    calibrations = calibrate(model, samples[arguments.contracts :])
    figures = measure_contracts(model, tokenizer, samples[: arguments.contracts], rows(calibrations, arguments.codings))
    print(table(figures), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in figures], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
