"""Which implementation of attention runs where.

``cpu.py`` and ``gpu.py`` have the functions of ``reference.py``. The choice is made at each call, so a change of MLX's
default device is honoured.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import mlx.core as mx

from turboquant.attention import cpu
from turboquant.attention import gpu as attention_gpu
from turboquant.attention import reference as attention
from turboquant.attention.reference import Partial
from turboquant.quant.layer import DenseLayer, EncodedLayer
from turboquant.runtime.device import on_cpu


class Backend(Protocol):
    """What a backend's module provides; see ``attention/reference.py`` for shapes."""

    def attend_dense(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
    ) -> Partial:
        """Attention over full-precision K/V."""
        ...

    def attend_layer(self, queries: mx.array, layer: EncodedLayer, scale: float) -> Partial:
        """Attention over an encoded layer."""
        ...


def backend() -> Backend:
    """The attention functions for MLX's default device."""
    return cpu if on_cpu() else attention_gpu


def has_kernel(layers: Iterable[EncodedLayer]) -> bool:
    """Whether encoded layers are attended by a kernel of their own, on MLX's default device."""
    return not on_cpu() and all(attention_gpu.knows(layer) for layer in layers)


def implementation(layers: Iterable[EncodedLayer | DenseLayer]) -> str:
    """What attends layers on MLX's default device: ``NumPy``, ``kernel`` (a GPU's) or ``MLX``."""
    if on_cpu():
        return "NumPy"
    encoded = [layer for layer in layers if isinstance(layer, EncodedLayer)]
    return "kernel" if encoded and has_kernel(encoded) else "MLX"


def attend_past_and_own(
    queries: mx.array,
    layer: EncodedLayer | DenseLayer,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of queries (B, n_heads, L, head_dim) over a shared past and their rows' own tokens, in their dtype.

    keys, values: (B, n_kv_heads, T, head_dim), full precision. mask: of those, see ``reference.attend_dense``.
    sinks: learned logits (n_heads,), or None. Where a kernel attends the past, it does all of a decoding step.
    """
    if queries.shape[2] == 1 and sinks is None and isinstance(layer, EncodedLayer) and has_kernel([layer]):
        seen = None if isinstance(mask, str) else mask  # one query sees all there is, if the mask is causal
        return attention_gpu.attend_step(queries, layer, keys, values, scale, seen)
    own = backend().attend_dense(queries, keys, values, scale, mask)
    return attention.finish(attention.merge([own, attend_past(queries, layer, scale)]), sinks, queries.dtype)


def attend_past(queries: mx.array, layer: EncodedLayer | DenseLayer, scale: float) -> Partial:
    """Attention of queries (B, n_heads, L, head_dim) over a shared past that every one of them may see."""
    if isinstance(layer, EncodedLayer):
        return backend().attend_layer(queries, layer, scale)
    block = attention.fold_queries(queries, layer.keys.shape[0])[None]
    part = backend().attend_dense(block, layer.keys[None], layer.values[None], scale, None)
    return attention.unfold_part(Partial(part.output[0], part.logsumexp[0]), queries.shape)
