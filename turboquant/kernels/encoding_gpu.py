"""Compress vectors on a GPU: one kernel, written once for CUDA and Metal, makes packed codes and scales from floats.

It computes the same as ``Codec.encode`` and, if a metric is given, ``round_in_metric`` of rounding.py. Its text is
``rotation.h``, ``vectors.h`` and ``encode.h`` in ``text/``; eight lanes work on each vector, in a metric on CUDA on two
at a time. A second kernel, ``feedback.h``, factorises a metric; on a CPU, rounding.py does this with LAPACK.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np

from turboquant.kernels.kernel_text import Launch
from turboquant.kernels.launch import gpu, launch, runs
from turboquant.kernels.programs import Variant, variant_of
from turboquant.quant import rounding
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.codebook import lloyd_max
from turboquant.quant.codec import LARGEST_SCALE, SMALLEST_SCALE, Codec, Encoded
from turboquant.quant.packing import PLANES, unpack
from turboquant.quant.rounding import RoundingMetric
from turboquant.quant.trellis import TrellisCodec
from turboquant.runtime.device import diagonals, identity_matrix, on_cpu

HEAD_DIMS = (64, 128, 256)
THREADS = 128
INPUTS = ("x", "order", "mean", "signs", "levels", "boundaries")
METRIC_INPUTS = ("code_of_bin", "feedback", "rows", "diagonal")
FEEDBACK_THREADS = 512
SMALLEST_PIVOT = 1e-6  # a damped metric's are larger
MOST_DISAGREEMENT = 0.02  # share of codes that may differ from the reference, because sums round differently
MOST_OFF = 1e-3  # largest difference of a factor from NumPy's
_TRIED = (2, 300)  # heads and vectors


def usable(codec: Codec, dtype: mx.Dtype, in_metric: bool) -> bool:
    """Return whether there is a GPU, and its kernel supports these vectors and agrees with ``Codec.encode``."""
    return not on_cpu() and codec.head_dim in HEAD_DIMS and _runs(codec, dtype, in_metric)


def encode(x: mx.array, order: mx.array, mean: mx.array, codec: Codec, metric: RoundingMetric | None) -> Encoded:
    """Compress vectors of x (H, T, head_dim), those that ``order`` (H, N) int32 names.

    mean: (H, head_dim) float32. metric: for H heads; see ``Codec.encode``.
    """
    heads, count = order.shape
    book = lloyd_max(codec.bits)
    what = _encode_launch(codec, metric is not None, heads, count)
    boundaries = np.append(book.boundaries, np.float32(np.inf))
    inputs = [
        x,
        mx.contiguous(order),
        mx.contiguous(mean),
        codec.rotation.signs,
        mx.array(book.levels),
        mx.array(boundaries),
    ]
    if metric is not None:
        inputs += [mx.array(rounding.code_of_bin(codec.bits)), *_laid_out(metric)]
    return Encoded(*launch(what, inputs))


def _encode_launch(codec: Codec, in_metric: bool, heads: int, count: int) -> Launch:
    return Launch(
        "encode",
        _defined(codec, in_metric),
        INPUTS + (METRIC_INPUTS if in_metric else ()),
        (("codes", (heads, count, codec.words), mx.uint32), ("scales", (heads, count), mx.float16)),
        (-(-count // (THREADS // 8 * _vectors(codec, in_metric))), heads, 1),
        THREADS,
        ("rotation.h", "vectors.h"),
        strided=True,
    )


def variants(codec: CacheCodec, dim: int, dtype: mx.Dtype) -> list[Variant | None]:
    """Return the kernels that encode a model's layers on CUDA, for keys and values of ``dtype``."""
    if dim not in HEAD_DIMS:
        return []
    found = [variant_of(_feedback_launch(1, dim), [(mx.float32, 3)])] if codec.query_aware else []
    kinds = dict.fromkeys((*INPUTS, *METRIC_INPUTS), (mx.float32, 2))
    kinds |= {"x": (dtype, 3), "order": (mx.int32, 2), "code_of_bin": (mx.uint8, 1)}
    codecs = [(of.keys(dim), codec.query_aware) for of in (codec, codec.fine)]
    codecs += [(of.values(dim), False) for of in (codec, codec.fine)]
    for own, in_metric in dict.fromkeys(codecs):
        if isinstance(own, TrellisCodec):  # trellis_search.py has kernels for it
            continue
        what = _encode_launch(own, in_metric, 1, 1)
        found.append(variant_of(what, [kinds[name] for name in what.inputs]))
    return found


def factors(dim: int) -> bool:
    """Return whether there is a GPU, and ``feedback`` supports metrics of this size and agrees with NumPy."""
    return not on_cpu() and dim in HEAD_DIMS and _factors(dim)


def feedback(metric: mx.array) -> mx.array:
    """Factorise a metric for rounding with feedback. Returns ``RoundingMetric.factor``, (H, dim, dim) float32.

    metric: (H, dim, dim) float32, symmetric and positive definite.
    """
    heads, dim, _ = metric.shape
    what = _feedback_launch(heads, dim)
    return launch(what, [metric])[0]


def _feedback_launch(heads: int, dim: int) -> Launch:
    return Launch(
        "feedback",
        (("DIM", dim), ("THREADS", FEEDBACK_THREADS), ("SMALLEST_PIVOT", SMALLEST_PIVOT)),
        ("metric",),
        (("factor", (heads, dim, dim), mx.float32),),
        (heads, 1, 1),
        FEEDBACK_THREADS,
    )


@functools.cache
def _factors(dim: int) -> bool:
    """Try ``feedback`` once, and compare it with NumPy."""
    looks = np.random.default_rng(0).normal(size=(2, dim, dim))
    metric = looks.swapaxes(1, 2) @ looks / dim + rounding.DAMPING * np.eye(dim)

    def off() -> float:
        found = np.array(feedback(mx.array(metric.astype(np.float32))))
        return float(np.abs(found - rounding.feedback(np, metric)).max())

    return runs("factoring kernels", off, MOST_OFF, dim)


@functools.cache
def _runs(codec: Codec, dtype: mx.Dtype, in_metric: bool) -> bool:
    """Try ``encode`` once, and compare it with ``Codec.encode``."""
    heads, count = _TRIED
    random = np.random.default_rng(0)
    looks = random.normal(size=(heads, 2 * codec.head_dim, codec.head_dim))

    def disagreement() -> float:
        with mx.stream(mx.cpu):  # on the GPU, MLX would compile kernels for these operations, for a minute
            x = mx.array(random.normal(size=(*_TRIED, codec.head_dim)).astype(np.float32)).astype(dtype)
            mean = mx.full((heads, 1, codec.head_dim), 0.1)
            order = mx.contiguous(mx.broadcast_to(mx.arange(count, dtype=mx.int32), (heads, count)))
            metric = codec.rounding_metric(looks.swapaxes(1, 2) @ looks) if in_metric else None
            expected = codec.encode(x, mean, metric)
            mx.eval(x, mean, order, expected.codes, expected.scales)
        found = encode(x, order, mean[:, 0], codec, metric)
        mx.eval(found.codes, found.scales)
        with mx.stream(mx.cpu):
            codes = (unpack(one.codes, codec.bits, codec.head_dim) for one in (expected, found))
            scales = mx.abs(found.scales / expected.scales - 1).mean()
            return max(float((next(codes) != next(codes)).mean()), float(scales))

    return runs("encoding kernels", disagreement, MOST_DISAGREEMENT, (codec, str(dtype), in_metric))


def _laid_out(metric: RoundingMetric) -> tuple[mx.array, mx.array, mx.array]:
    """Return a metric as the kernel reads it: ``factor`` and ``pull``, transposed, with ones on the diagonal; and the
    diagonal of ``damped``, (H, dim).

    Rows are arranged so that the eight lanes, which read four numbers each, read neighbouring memory.
    """
    heads, dim, _ = metric.pull.shape
    one = identity_matrix(mx, dim)

    def rows(matrix: mx.array) -> mx.array:
        turned = (mx.array(matrix) + one).swapaxes(1, 2).reshape(heads, dim, 8, dim // 32, 4)
        return mx.contiguous(turned.transpose(0, 1, 3, 2, 4))

    return rows(metric.factor), rows(metric.pull), mx.contiguous(diagonals(mx, mx.array(metric.damped)))


def _vectors(codec: Codec, in_metric: bool) -> int:
    """Return how many vectors eight lanes round at a time.

    Reading the metric's rows from the cache bounds the kernel, and two vectors share what is read. Registers are enough
    for that on CUDA, with head_dims up to 128.
    """
    return 2 if in_metric and codec.head_dim <= 128 and gpu() == "cuda" else 1


def _defined(codec: Codec, in_metric: bool) -> tuple[tuple[str, int | float], ...]:
    """Return the constants that are compiled into the kernel."""
    dim = codec.head_dim
    return (
        ("DIM", dim),
        ("RUN", dim // 8),
        ("VECTORS", _vectors(codec, in_metric)),
        ("ROOT", dim**-0.5),
        ("BITS", codec.bits),
        ("LOW", PLANES[codec.bits][0]),
        ("THREADS", THREADS),
        ("METRIC", int(in_metric)),
        ("SWEEPS", rounding.SWEEPS),
        ("FEWEST_FOR_FEEDBACK", rounding.FEWEST_FOR_FEEDBACK),
        ("BINS", rounding.BINS),
        ("REACH", rounding.REACH),
        ("SMALLEST_SCALE", SMALLEST_SCALE),
        ("LARGEST_SCALE", LARGEST_SCALE),
    )
