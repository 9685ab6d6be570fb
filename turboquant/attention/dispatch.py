"""Choose the implementation of attention for MLX's default device.

cpu.py and gpu.py have the two functions of ``Backend``; both compute the same as reference.py. gpu.py also has a kernel
for a whole decoding step. The choice is made at each call, because the default device may change.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import mlx.core as mx

from turboquant.attention import cpu, reference
from turboquant.attention import gpu as attention_gpu
from turboquant.attention.reference import Partial
from turboquant.kernels import encoding_gpu, query_stats_gpu, trellis_search
from turboquant.kernels.kernel_text import Beginning
from turboquant.kernels.launch import gpu
from turboquant.kernels.programs import compile_ahead
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.layer import DenseLayer, EncodedLayer
from turboquant.runtime.device import on_cpu


class Backend(Protocol):
    """The functions that the module of a backend has; see attention/reference.py for shapes."""

    def attend_dense(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
    ) -> Partial:
        """Attention over full-precision K/V."""
        ...

    def attend_layer(self, queries: mx.array, layer: EncodedLayer, scale: float) -> Partial:
        """Attention over an encoded layer."""
        ...


def backend() -> Backend:
    """Return the attention functions for MLX's default device."""
    return cpu if on_cpu() else attention_gpu


def has_kernel(layers: Iterable[EncodedLayer]) -> bool:
    """Return whether MLX's default device has a kernel for attention to these encoded layers."""
    return not on_cpu() and all(attention_gpu.supports(layer) for layer in layers)


def implementation(layers: Iterable[EncodedLayer | DenseLayer]) -> str:
    """Name what attends to these layers on MLX's default device: ``NumPy``, ``kernel`` (of a GPU) or ``MLX``."""
    if on_cpu():
        return "NumPy"
    encoded = [layer for layer in layers if isinstance(layer, EncodedLayer)]
    return "kernel" if encoded and has_kernel(encoded) else "MLX"


def attend_past_and_suffix(
    queries: mx.array,
    layer: EncodedLayer | DenseLayer,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
    buffers: tuple[mx.array, mx.array] | None = None,
) -> mx.array:
    """Attention of queries (B, n_heads, L, head_dim) over a shared past and each row's suffix, in the queries' dtype.

    keys, values: of the suffixes, (B, n_kv_heads, T, head_dim), full precision. mask: of the suffixes, see
    ``reference.attend_dense``. sinks: learned logits (n_heads,), or None. If there is a kernel for the past, it does
    the whole of a decoding step. buffers: larger arrays whose first T tokens are keys and values, if there are any; the
    kernel then reads those instead of slices, which MLX would copy.
    """
    if queries.shape[2] == 1 and sinks is None and isinstance(layer, EncodedLayer) and has_kernel([layer]):
        seen = None if isinstance(mask, str) else mask  # a causal mask hides nothing from one query
        count = keys.shape[2]
        first, second = (keys, values) if buffers is None else (Beginning(x, count) for x in buffers)
        return attention_gpu.attend_step(queries, layer, first, second, scale, seen)
    suffix = backend().attend_dense(queries, keys, values, scale, mask)
    return reference.finish(reference.merge([suffix, attend_past(queries, layer, scale)]), sinks, queries.dtype)


def prepare_kernels(codec: CacheCodec, head_dim: int, dtype: mx.Dtype) -> None:
    """Start to compile the GPU kernels that a model of this head_dim and dtype needs, in other threads.

    To be called as soon as the model's sizes are known. Does nothing on a CPU or on Metal, where MLX compiles kernels
    when they are first used.
    """
    if not on_cpu() and gpu() == "cuda" and not codec.is_uncompressed:
        encoding = [*query_stats_gpu.variants(), *encoding_gpu.variants(codec, head_dim, dtype)]
        encoding += trellis_search.variants(codec, head_dim, dtype)
        compile_ahead([*encoding, *attention_gpu.variants(codec, head_dim, dtype)])


def attend_past(queries: mx.array, layer: EncodedLayer | DenseLayer, scale: float) -> Partial:
    """Attention of queries (B, n_heads, L, head_dim) over a shared past; every query sees all of its tokens."""
    if isinstance(layer, EncodedLayer):
        return backend().attend_layer(queries, layer, scale)
    block = reference.fold_queries(queries, layer.keys.shape[0])[None]
    part = backend().attend_dense(block, layer.keys[None], layer.values[None], scale, None)
    return reference.unfold_part(Partial(part.output[0], part.logsumexp[0]), queries.shape)
