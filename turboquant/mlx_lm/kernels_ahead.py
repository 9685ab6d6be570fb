"""Compile the kernels that MLX itself compiles on CUDA before they are needed, in several processes at once.

MLX compiles the kernel of some operations when it first runs them: about four seconds each, products with quantised
weights 50 seconds each, one after the other. A first run on a machine meets about ten, and three more if the model is
quantised. So processes run these operations on a few numbers while the model is loaded. They keep the kernels in the
user's cache, and put them into the folder where the model's process looks.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from turboquant.attention import reference
from turboquant.kernels.compiled_files import compiled_files, key_of
from turboquant.kernels.mlx_modules import keep, own_folder
from turboquant.quant.rotation import Rotation

ROWS_OF_PRODUCTS = (16, 32, 64)  # MLX has a kernel for up to 16 rows, one for up to 32, and one for more
PROCESS_BYTES = 2 << 30  # of the GPU's free memory for each process; its context takes about a quarter of that


@dataclass(frozen=True)
class Quantized:
    """How weights are quantised, in the words of ``mx.quantize``."""

    group_size: int
    bits: int
    mode: str = "affine"

    def __str__(self) -> str:
        return f"{self.group_size}-{self.bits}-{self.mode}"

    @classmethod
    def parse(cls, text: str) -> Quantized:
        """Return what ``str`` made a text of."""
        group_size, bits, mode = text.split("-", 2)
        return cls(int(group_size), int(bits), mode)


@functools.cache
def start(dtype: mx.Dtype, head_dim: int, quantized: Sequence[Quantized] = ()) -> list[subprocess.Popen[bytes]]:
    """Start to compile the kernels of a model of this dtype and head_dim that were not compiled on this machine yet.

    quantized: how its weights are quantised, a tuple.
    Does nothing if there is no CUDA GPU, or if the user chose the folder of MLX's kernels. Called again with the same
    arguments, it starts nothing and returns the same processes.
    Returns the processes, which are ended at the latest when this process ends.
    """
    folder = own_folder()
    if folder is None:
        return []
    wanted = [*OPERATIONS, *(f"product {rows} {how}" for how in quantized for rows in ROWS_OF_PRODUCTS)]
    names = [name for name in wanted if compiled_files().read("ahead", _key(name, dtype, head_dim)) is None]
    memory = int(mx.device_info().get("free_memory", 0))
    count = min(len(names), os.cpu_count() or 1, memory // PROCESS_BYTES)
    kind, processes = str(dtype).removeprefix("mlx.core."), []
    for number in range(count):
        command = [sys.executable, "-m", __name__, str(folder), kind, str(head_dim), *names[number::count]]
        with contextlib.suppress(OSError):
            processes.append(subprocess.Popen(command, **_SILENT))
    atexit.register(_end, processes)
    return processes


def main(arguments: Sequence[str]) -> None:
    """Run operations in this process, and put the kernels that MLX compiled for them into another process's folder.

    arguments: the other process's folder, a dtype, a head_dim, and names of operations.
    """
    folder, kind, head_dim, *names = arguments
    own, dtype = own_folder(), getattr(mx, kind)
    if own is None:
        return
    known = {str(path.relative_to(own)) for path in own.rglob("*.ptx")}
    for name in names:
        mx.eval(operation(name)(dtype, int(head_dim)))
        hand_over(own, known, Path(folder))
        keep(own, known)
        compiled_files().write("ahead", _key(name, dtype, int(head_dim)), b"", {"operation": name})


def operation(name: str) -> Callable[[mx.Dtype, int], mx.array]:
    """Return an operation of OPERATIONS, or the product that a name like ``product 16 64-4-affine`` stands for."""
    if name in OPERATIONS:
        return OPERATIONS[name]
    _, rows, how = name.split(" ", 2)
    return functools.partial(_product, int(rows), Quantized.parse(how))


def hand_over(own: Path, known: set[str], folder: Path) -> None:
    """Copy kernels to ``folder``, except the files ``known``. The file that MLX looks for appears last and whole."""
    for code in sorted(own.rglob("*.ptx")):
        module = code.relative_to(own)
        if str(module) in known:
            continue
        with contextlib.suppress(OSError):  # the other process may have ended
            for file in (code.with_suffix(".txt"), code):
                there = folder / file.relative_to(own)
                there.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, temporary := there.with_name(f".{uuid.uuid4().hex}"))
                os.replace(temporary, there)


def _indexed(dtype: mx.Dtype, index: mx.Dtype) -> mx.array:
    return mx.zeros((4, 64), dtype)[mx.array([0, 1], index)]


def _rolled(dtype: mx.Dtype, head_dim: int) -> mx.array:
    """Roll the rows of a batch, as mlx-lm's caches do where prompts are padded."""
    return mx.take_along_axis(mx.zeros((2, 1, 4, head_dim), dtype), mx.zeros((2, 1, 4, 1), mx.int32), axis=2)


def _merged(dtype: mx.Dtype, head_dim: int) -> mx.array:
    part = reference.Partial(mx.zeros((1, 1, 2, head_dim)), mx.zeros((1, 1, 2)))
    return reference.merge([part, part]).output


def _attended(dtype: mx.Dtype, head_dim: int) -> mx.array:
    x = mx.zeros((1, 1, 2, head_dim), dtype)
    return reference.attend_dense(x, x, x, 1.0, None).output


def _gated(dtype: mx.Dtype, head_dim: int) -> mx.array:
    """Compute the activation of most models, from its file alone: to import mlx-lm takes seconds."""
    package = importlib.util.find_spec("mlx_lm")
    assert package is not None
    assert package.submodule_search_locations is not None
    models = str(Path(package.submodule_search_locations[0]) / "models")
    spec = importlib.machinery.PathFinder.find_spec("activations", [models])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    gated: mx.array = module.swiglu(mx.zeros((1, 2, 64), dtype), mx.zeros((1, 2, 64), dtype))
    return gated


def _product(rows: int, how: Quantized, dtype: mx.Dtype, _: int) -> mx.array:
    matrix = mx.quantize(mx.zeros((1024, 1024), dtype), **asdict(how))
    return mx.quantized_matmul(mx.zeros((1, rows, 1024), dtype), *matrix, transpose=True, **asdict(how))


OPERATIONS: dict[str, Callable[[mx.Dtype, int], mx.array]] = {
    "embed": lambda dtype, _: _indexed(dtype, mx.uint32),
    "gated": _gated,
    "filter": lambda dtype, _: _indexed(dtype, mx.int32),
    "roll": _rolled,
    "offsets": lambda _, __: mx.zeros((4,), mx.int32)[mx.array([0, 1], mx.int32)],
    "tokens": lambda _, __: mx.zeros((4,), mx.uint32)[mx.array([0, 1], mx.int32)],
    "levels": lambda _, __: _indexed(mx.float32, mx.uint32),
    "rotate": lambda _, head_dim: Rotation(head_dim).forward(mx.zeros((2, head_dim))),
    "merge": _merged,
    "attend": _attended,
}

_SILENT: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _key(name: str, dtype: mx.Dtype, head_dim: int) -> str:
    versions = [metadata.version(package) for package in ("mlx", "mlx-lm")]
    return key_of(name, *versions, mx.device_info().get("architecture", ""), str(dtype), head_dim)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
