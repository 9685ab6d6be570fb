"""Where MLX computes, and with which array module work that suits both NumPy and MLX is done there."""

from __future__ import annotations

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
