"""Keys and values by a trellis code, emulated: how much less they lose than scalar codes of the same number of bits.

    python -m benches.trellis --model SMOLLM2 --data CUAD --tokens 4000 --contracts 10 --questions 6

Contracts and questions are those of contracts.py. Each context is encoded by the codec as it is. Then the codes of its
coarse tokens are replaced: of each coordinate, every 128 tokens form a string of a trellis code (viterbi.py), whose
table was trained on normal numbers. Scales, means, sinks and finer tokens stay as they are, and no bits are added. The
decoded keys and values are attended in float32. It runs on CUDA, and for tiny contexts on a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from benches.contracts import contract_samples, measure_contracts
from benches.viterbi import SMALL, TrellisCode, trained_code
from turboquant.fidelity import load_model, table
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.codec import Codec, Encoded
from turboquant.quant.layer import DenseLayer, EncodedLayer
from turboquant.quant.rounding import SWEEPS, RoundingMetric
from turboquant.runtime.device import array_module, as_float32

if TYPE_CHECKING:
    from turboquant.eval.results import Baseline
    from turboquant.eval.teacher_forcing import Context

# Codes by the bits of a number: bits of a state, and masks of parities; see ``viterbi.trained_code``.
CODES = {4: ((9, ()), SMALL[4]), 3: ((8, ()), SMALL[3]), 2: ((8, ()), SMALL[2])}
POWER = 0.25  # of squared attention, by which tokens are weighted
BLOCK = 16  # coordinates that are searched by one start of a kernel
LEAST_ATTENTION = 0.01  # share of the mean that is added to a token's squared attention, so that all tokens count


@dataclass(frozen=True)
class Trellis:
    """How coarse tokens are coded by a trellis.

    keys, values: their codes; None for the codec's own.
    projected: whether values are rounded in the metric of the output projection.
    attention_power: of the squared attention that a token gets, by which its errors are weighted.
    length_power: of a vector's squared length, by which its errors are weighted.
    feedback: whether vectors in a metric are rounded with feedback before coordinate descent.
    sweeps: of coordinate descent.
    """

    keys: TrellisCode | None
    values: TrellisCode | None
    projected: bool = False
    attention_power: float = 0.0
    length_power: float = 0.0
    feedback: bool = True
    sweeps: int = SWEEPS


def trellis_baselines(codec: CacheCodec, rows: dict[str, Trellis]) -> list[Baseline]:
    """Return the codec with its coarse tokens coded by a trellis, in several ways by name."""
    from turboquant.caches.prefix import Prefix
    from turboquant.eval.results import Baseline, Filled

    last: list[tuple[Context, list[_Layer]]] = []  # all rows start from the same layers of a context

    def fill_by(trellis: Trellis) -> Callable[[Context], Filled]:
        def fill(context: Context) -> Filled:
            if not last or last[0][0] is not context:
                last[:] = [(context, _prepare(context, codec))]
            prepared = last[0][1]
            layers = list(context.caches)
            compressible = [index for index, yes in enumerate(context.compressible) if yes]
            for index, layer in zip(compressible, _decoded(prepared, trellis), strict=True):
                layers[index] = layer
            return Filled(Prefix(tuple(layers), len(context.tokens)), sum(layer.scalar.nbytes for layer in prepared))

        return fill

    return [
        Baseline(name, codec.key_bits, codec.value_bits, "exact", fill_by(trellis)) for name, trellis in rows.items()
    ]


@dataclass(frozen=True)
class Coarse:
    """The coarse keys, or values, of one layer, in the basis in which they are coded.

    unit: (H, dim, E) float32, vectors of norm sqrt(dim). norm: (H, E), theirs before. shift: (H, E, dim), the mean
    where it was subtracted. metric: None for a small error in all directions alike.
    """

    unit: mx.array
    norm: mx.array
    shift: mx.array
    metric: RoundingMetric | None
    codec: Codec


@dataclass(frozen=True)
class _Layer:
    """A layer in scalar codes, and what is needed to code its E coarse tokens again.

    attention: (H, E), the squared attention that each token gets, as a share of the mean over all tokens.
    """

    scalar: EncodedLayer
    keys: Coarse
    values: Coarse
    attention: mx.array


def _prepare(context: Context, codec: CacheCodec) -> list[_Layer]:
    """Encode each compressible layer of a context as the codec does."""
    from turboquant.kernels.encoding import encode_layer, order_tokens

    layers = []
    for index, cache in enumerate(context.caches):
        if not context.compressible[index]:
            continue
        (keys,), (values,) = cache.keys_and_values()
        queries = cache.queries.statistics()
        scalar = encode_layer(keys, values, codec, queries)
        metric, attention, order, fine = order_tokens(keys, codec, queries)
        tokens = codec.sinks + order[:, : order.shape[1] - fine]
        attention = mx.array(attention)
        attention = attention / attention.mean(axis=1, keepdims=True) + LEAST_ATTENTION
        projected = _output_metric(context.model.layers[index].self_attn.o_proj, queries.sampled.shape[0], values)
        own, of_values = scalar.key_codec, scalar.value_codec
        layers.append(
            _Layer(
                scalar,
                _coarse(keys, tokens, scalar.keys, scalar.key_mean, own, metric),
                _coarse(values, tokens, scalar.values, scalar.value_mean, of_values, projected),
                mx.take_along_axis(attention, tokens, axis=1),
            )
        )
        mx.eval(layers[-1].attention, layers[-1].keys.unit, layers[-1].values.unit)
    return layers


def _output_metric(projection: Any, n_heads: int, values: mx.array) -> Any:
    """Return the metric (H, dim, dim) in which the error of values is that of the output projection's result."""
    heads, _, dim = values.shape
    matrix = projection(mx.eye(n_heads * dim)).astype(mx.float32).reshape(heads, n_heads // heads, dim, -1)
    rows = matrix.swapaxes(1, 2).reshape(heads, dim, -1)
    metric = rows @ rows.swapaxes(1, 2)
    return np.array(metric, np.float64) if array_module() is np else metric


def _decoded(layers: list[_Layer], trellis: Trellis) -> Iterator[DenseLayer]:
    """Return the layers with their coarse tokens coded by a trellis and decoded again."""
    weights = mx.concatenate([layer.attention for layer in layers]) ** trellis.attention_power
    values = [layer.values for layer in layers]
    if not trellis.projected:
        values = [replace(one, metric=None) for one in values]
    keys = [layer.keys for layer in layers]
    coded_keys = _coded(keys, trellis.keys, weights, trellis) if trellis.keys else None
    coded_values = _coded(values, trellis.values, weights, trellis) if trellis.values else None
    for number, layer in enumerate(layers):
        all_keys, all_values = layer.scalar.decode()
        first = layer.scalar.sink_keys.shape[1]
        some = slice(first, first + layer.scalar.keys.tokens)
        if coded_keys:
            all_keys[:, some] = coded_keys[number]
        if coded_values:
            all_values[:, some] = coded_values[number]
        mx.eval(all_keys, all_values)
        yield DenseLayer(all_keys, all_values)


def _coarse(x: mx.array, tokens: mx.array, scalar: Encoded, mean: mx.array, codec: Codec, metric: Any) -> Coarse:
    shift = mx.where((scalar.scales > 0)[..., None], mean, 0.0)
    some = mx.take_along_axis(x, tokens[..., None], axis=1).astype(mx.float32) - shift
    rotated = codec.rotation.forward(some)
    norm = mx.sqrt(mx.square(rotated).mean(axis=-1))
    unit = (rotated / mx.maximum(norm, 1e-30)[..., None]).swapaxes(1, 2)
    return Coarse(mx.contiguous(unit), norm, shift, codec.rounding_metric(metric), codec)


def _coded(layers: list[Coarse], code: TrellisCode, weights: mx.array, trellis: Trellis) -> list[mx.array]:
    """Encode and decode all layers together, so that a GPU has enough strings; returns vectors (H, E, dim) of each."""
    xp = array_module()
    unit = as_float32(xp, mx.concatenate([layer.unit for layer in layers]))
    norm = mx.concatenate([layer.norm for layer in layers])
    norm = norm / norm.mean(axis=1, keepdims=True)
    weight = as_float32(xp, weights * norm ** (2 * trellis.length_power))
    if layers[0].metric is None:
        levels = nearest(xp, code, unit, weight)
        factor = 1 / xp.sqrt((levels * levels).mean(axis=1))
    else:
        fields = zip(*((m.factor, m.pull, m.damped) for m in (layer.metric for layer in layers)), strict=True)
        metric = RoundingMetric(*(xp.concatenate(list(field)) for field in fields))
        levels, factor = round_in_metric(xp, code, unit, metric, weight, trellis)
    levels, factor, found, first = mx.array(levels), mx.array(factor), [], 0
    for layer in layers:
        some = slice(first, first + layer.norm.shape[0])
        scale = (layer.norm * factor[some]).astype(mx.float16).astype(mx.float32)
        rotated = levels[some].swapaxes(1, 2) * scale[..., None]
        found.append(layer.codec.rotation.inverse(rotated) + layer.shift)
        first = some.stop
    mx.eval(found)
    return found


def nearest(xp: Any, code: TrellisCode, unit: Any, weight: Any) -> Any:
    """Return the levels (H, dim, T) of strings that are near to unit (H, dim, T); weight (H, T)."""
    heads, dim, tokens = unit.shape
    parts = unit.reshape(heads * dim // BLOCK, BLOCK, tokens)  # so that a GPU has enough strings at a time
    root = xp.repeat(xp.sqrt(weight), dim // BLOCK, axis=0)
    return code.encode(xp, parts, xp.ones_like(root), root)[1].reshape(unit.shape)


def round_in_metric(
    xp: Any, code: TrellisCode, unit: Any, metric: RoundingMetric, weight: Any, trellis: Trellis
) -> tuple[Any, Any]:
    """Do what ``rounding.round_in_metric`` does, with a string along the tokens of each coordinate.

    unit: (H, dim, T) float32 or float16. weight: (H, T). Returns levels (H, dim, T) and factors (H, T).
    """
    factor, pull, damped = (x.astype(unit.dtype) for x in (metric.factor, metric.pull, metric.damped))
    scaled, root = damped @ unit, xp.sqrt(weight)
    former = None
    if trellis.feedback:
        former, levels = _sweep(xp, code, unit, xp.zeros_like(unit), factor, xp.ones_like(weight), root, -1, None)
    else:
        levels = nearest(xp, code, unit, weight)
    for _ in range(trellis.sweeps):
        scale = xp.clip(_products(xp, levels, scaled) / _products(xp, levels, damped @ levels), 0.5, 2.0)
        error = scale[:, None].astype(unit.dtype) * levels - unit
        former, levels = _sweep(xp, code, unit, error, pull, scale, root, 1, former)
    exact, found = _products(xp, unit, scaled), _products(xp, levels, scaled)
    return levels, xp.clip(exact / xp.maximum(found, 1e-9), 0.5, 2.0)


def _products(xp: Any, one: Any, other: Any) -> Any:
    """Return the scalar products of vectors (H, dim, T), as (H, T) float32."""
    return (one * other).astype(xp.float32).sum(axis=1)


def _sweep(
    xp: Any, code: TrellisCode, unit: Any, error: Any, pull: Any, scale: Any, root: Any, step: int, former: Any
) -> tuple[Any, Any]:
    """Choose strings coordinate by coordinate, each by how far ``pull`` and the errors of all others move it.

    error: (H, dim, T), the errors before; they are replaced. former: the states before, if there are any.
    Returns states and levels (H, dim, T).
    """
    starts = range(0, unit.shape[1], BLOCK)[::step]
    found = {}
    for start in starts:
        some = slice(start, start + BLOCK)
        target = unit[:, some] - pull[:, some] @ error
        others = pull[:, some, some], unit[:, some], error[:, some]
        before = None if former is None else former[:, some]
        found[start] = code.encode(xp, target, scale, root, others, step < 0, before)
        error[:, some] = scale[:, None].astype(unit.dtype) * found[start][1] - unit[:, some]
    return tuple(xp.concatenate([found[start][which] for start in sorted(found)], axis=1) for which in (0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure trellis codes beside the codec's scalar codes.")
    parser.add_argument("--model", required=True, help="a model folder with a chat template")
    parser.add_argument("--data", required=True, type=Path, help="the folder of contracts and questions")
    parser.add_argument("--tokens", type=int, default=4000, help="length of the contexts")
    parser.add_argument("--longest", type=int, default=7500, help="use only contracts of so many tokens or more")
    parser.add_argument("--contracts", type=int, default=10)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first contracts")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    model.set_dtype(mx.float32)
    contracts = arguments.skip + arguments.contracts
    samples = contract_samples(
        tokenizer, arguments.data, arguments.tokens, arguments.longest, contracts, arguments.questions
    )
    figures = measure_contracts(model, tokenizer, samples[arguments.skip :], _rows())
    print(table(figures), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in figures], indent=1), encoding="utf-8")


def _rows() -> list[Baseline]:
    from turboquant.eval.baselines import exact

    rows: list[Baseline] = []
    for bits, codes in CODES.items():
        codec, settings = CacheCodec(bits, bits), dict[str, Trellis]()
        for log_states, parities in codes:
            code = trained_code(bits, log_states, parities)
            name = f"{1 << (bits + len(parities) if parities else log_states)} levels"
            once = Trellis(code, code, attention_power=POWER, length_power=1.0, sweeps=1)
            settings |= {name: once, f"{name}, values in a metric": replace(once, projected=True)}
        rows += [exact(codec), *trellis_baselines(codec, settings)]
    return rows


if __name__ == "__main__":
    main()
