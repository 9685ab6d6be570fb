"""Where MLX computes, and what suits that: weights' dtype, and the array module for work that NumPy and MLX both do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np


def on_cpu() -> bool:
    """Whether MLX's default device is the CPU."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def array_module() -> Any:
    """NumPy on a CPU, where MLX's small operations and exponentials are slow; MLX elsewhere."""
    return np if on_cpu() else mx


def to_module(xp: Any, x: mx.array) -> Any:
    """x as float32 of that module, without a copy where x is float32 already. A NumPy view is not to be written to."""
    x = x.astype(mx.float32)
    return np.asarray(x) if xp is np else x


def fused(f: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Elementwise operations in few kernels, where starting them and passing results on takes time: on a GPU."""
    compiled: Callable[..., mx.array] = mx.compile(f, shapeless=True)
    return lambda *arrays: f(*arrays) if on_cpu() else compiled(*arrays)


def settle_weights(model: Any, group: mx.distributed.Group | None = None) -> None:
    """Read a lazily loaded model's weights from disk; on a CPU as float32, quantised ones too.

    MLX computes half precision there at 2 to 5 GFLOP/s and quantised layers at 2, float32 at the speed of the BLAS.

    group: of processes that hold the model between them, of which each keeps its part.
    """
    from mlx_lm.utils import dequantize_model

    if on_cpu():
        model.set_dtype(mx.float32)  # scales before weights: dequantising in half precision would round
        dequantize_model(model)
        model.set_dtype(mx.float32)  # some formats dequantise to bfloat16 whatever their scales
    if group is not None:
        model.shard(group)
    mx.eval(model.parameters())
