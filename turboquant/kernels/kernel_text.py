"""The texts of the GPU kernels, written once for CUDA and Metal, and descriptions of how a kernel is started.

The folder ``text/`` has a body for each kernel: plain C++, except for the names that ``cuda.h`` and ``metal.h`` define.
So tests can compile and run a kernel on a machine without a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Launch:
    """A kernel of ``text/`` and how it is started: ``groups`` thread-groups of ``threads`` threads each.

    constants: compiled into the kernel. outputs: names, shapes and dtypes. headers: texts that the body needs.
    strided: the body reads inputs by their strides; else inputs that are not contiguous are copied.
    shared_bytes: what a thread-group shares beside the arrays that the text declares; only for launches of programs.py.
    """

    name: str
    constants: tuple[tuple[str, int | float], ...]
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, tuple[int, ...], mx.Dtype], ...]
    groups: tuple[int, int, int]
    threads: int
    headers: tuple[str, ...] = ()
    strided: bool = False
    shared_bytes: int = 0

    @functools.cached_property
    def programs(self) -> dict[tuple[tuple[mx.Dtype, int], ...], Any]:
        """The programs that programs.py has compiled for this launch, by the kinds of the inputs."""
        return {}


@dataclass(frozen=True)
class Beginning:
    """The first ``count`` entries of the third axis of an array, as an input of a strided kernel.

    A slice of MLX cannot be used, because MLX does not show its strides.
    """

    whole: mx.array
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the slice."""
        return (*self.whole.shape[:2], self.count, *self.whole.shape[3:])

    def slice(self) -> mx.array:
        """The entries as an array."""
        return self.whole[:, :, : self.count]


Input = mx.array | Beginning


def text(name: str) -> str:
    """Return the content of a file in ``text/``."""
    return (resources.files("turboquant.kernels") / "text" / name).read_text(encoding="utf-8")


def defines(constants: tuple[tuple[str, int | float], ...]) -> str:
    """Return constants as lines for the preprocessor."""
    lines = (f"#define {name} {value}{'f' if isinstance(value, float) else ''}\n" for name, value in constants)
    return "".join(lines)
