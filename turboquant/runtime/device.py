"""Adapt work to MLX's default device: the dtype of weights, and which array module does what NumPy and MLX both can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np


def on_cpu() -> bool:
    """Return whether MLX's default device is the CPU."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def device_family() -> str:
    """Return the kind of MLX's default device: cpu, cuda or metal."""
    return "cpu" if on_cpu() else "cuda" if mx.cuda.is_available() else "metal"


def array_module() -> Any:
    """Return NumPy on a CPU, where MLX's small operations and exponentials are slow, and mlx.core elsewhere."""
    return np if on_cpu() else mx


def as_float32(xp: Any, x: mx.array) -> Any:
    """Convert x to a float32 array of the module `xp`.

    A float32 x is not copied: NumPy then gets a view of it, which must not be written to.
    """
    x = x.astype(mx.float32)
    return np.asarray(x) if xp is np else x


def diagonals(xp: Any, matrices: Any) -> Any:
    """Return the diagonals (H, n) of matrices (H, n, n) of the module `xp`.

    MLX's own function gathers them, for which MLX compiles a kernel on CUDA, in seconds.
    """
    if xp is np:
        return np.diagonal(matrices, axis1=1, axis2=2)
    return matrices.reshape(matrices.shape[0], -1)[:, :: matrices.shape[1] + 1]


def traces(xp: Any, matrices: Any) -> Any:
    """Return the traces (H,) of matrices (H, n, n) of the module `xp`."""
    return np.trace(matrices, axis1=1, axis2=2) if xp is np else diagonals(xp, matrices).sum(axis=-1)


def identity_matrix(xp: Any, size: int) -> Any:
    """Return the identity matrix of the module `xp`, of MLX as float32, for the reason of ``diagonals``."""
    return np.eye(size) if xp is np else mx.array(np.eye(size, dtype=np.float32))


def host_copies(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return tensors that the host may read while a GPU works: copies on CUDA, the tensors themselves elsewhere.

    When the host first reads an array, MLX for CUDA moves it to memory that both can reach and frees the memory where
    it was. A launch that another thread has recorded, but not started yet, keeps the old address and reads freed
    memory. No launch reads a copy, so a copy may be moved.
    """
    if on_cpu() or not mx.cuda.is_available():
        return dict(tensors)
    copies = {name: mx.where(mx.array(True), x, x) for name, x in tensors.items()}  # an operation that shares nothing
    mx.eval(copies)
    return copies


def wait_on_gpu(stream: Any) -> None:
    """Wait until a GPU has finished the work of a stream; do nothing on a CPU.

    When an array is dropped, MLX gives its memory to the next array, of any stream, even if a launch has not yet
    written to it. So code that drops the outputs of such a launch must wait for the launch first.
    """
    if not on_cpu():
        mx.synchronize(stream)


def fused(f: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Compile elementwise operations into few kernels for a GPU, where each start of a kernel takes time."""
    compiled: Callable[..., mx.array] = mx.compile(f, shapeless=True)
    return lambda *arrays: f(*arrays) if on_cpu() else compiled(*arrays)
