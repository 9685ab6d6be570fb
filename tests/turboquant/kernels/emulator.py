"""Runs the GPU kernels' text as C++, thread by thread (emulate.h), in place of ``launch``.

Every array lies between pages that may be neither read nor written, right before one or right behind one, and what is
in its memory but not in the array is poisoned.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant.kernels.kernel_text import Beginning, Input, Launch, defines, text

TYPES = {
    mx.float32: "float",
    mx.float16: "half",
    mx.uint32: "u32",
    mx.int32: "int",
    mx.uint8: "u8",
    mx.bool_: "bool",
}
LONG = ("search",)  # kernels that run for longer than a compiler takes to optimise them
# The processor's own instructions convert halves, but products are not fused with sums. Nothing is linked, because this
# process has what the kernels call.
ON_LINUX = ("-march=native", "-ffp-contract=off", "-nostdlib", "-fno-threadsafe-statics")
ENDED, WAITS_FOR_EVER, OUTSIDE = range(3)  # what a run comes to
EMULATOR = (Path(__file__).parent / "emulate.h").read_text(encoding="utf-8")


def faulty_launch(fault: str) -> Callable[[Launch, Sequence[Input]], list[mx.array]]:
    """Return what ``launch`` is on a device where kernels do not run ("raises"), or compute zeros ("wrong")."""

    def launched(what: Launch, inputs: Sequence[Input]) -> list[mx.array]:
        if fault == "raises":
            raise RuntimeError("no such instruction")
        return [mx.zeros(shape, dtype) for _, shape, dtype in what.outputs]

    return launched


def emulated_launch(
    folder: Path, backend: str, what: Launch, given: Sequence[Input], at_end: bool = True
) -> list[mx.array]:
    """As ``launch``, with lanes as ``backend`` has them and outputs poisoned.

    folder: keeps what is compiled. at_end: arrays lie right before the pages that may not be read, else behind them.
    """
    inputs = [x.slice() if isinstance(x, Beginning) else x for x in given]
    types = {name: f"const {TYPES[x.dtype]}*" for name, x in zip(what.inputs, inputs, strict=True)}
    types |= {name: f"{TYPES[dtype]}*" for name, _, dtype in what.outputs}
    source = defines(what.constants)
    source += ("#define METAL_LANES\n" if backend == "metal" else "") + EMULATOR
    source += "".join(text(file) for file in what.headers if file != "hopper.h")
    source += "".join(f"static {kind} {key};\n" for key, kind in types.items())
    if what.strided:
        source += "".join(f'extern "C" {{ long long {x}_shape[8], {x}_strides[8]; }}\n' for x in what.inputs)
    source += "static void body() {\n" + text(f"{what.name}.h") + "}\n"
    source += 'extern "C" int run(int groups_x, int groups_y, int groups_z, int threads, void** arrays) {\n'
    source += "".join(f"{key} = ({kind})arrays[{i}];\n" for i, (key, kind) in enumerate(types.items()))
    source += "return run_groups(groups_x, groups_y, groups_z, threads);\n}\n"
    library = _compiled(folder, source, "-O1" if what.name in LONG else "-O0")
    arrays = [np.asarray(x) if what.strided else np.ascontiguousarray(np.array(x)) for x in inputs]
    for name, array in zip(what.inputs, arrays, strict=True) if what.strided else ():
        for of, numbers in ("shape", array.shape), ("strides", [n // array.itemsize for n in array.strides]):
            found = (ctypes.c_longlong * 8).in_dll(library, f"{name}_{of}")
            found[: array.ndim] = numbers
    arrays += [np.asarray(mx.zeros(shape, dtype)) for _, shape, dtype in what.outputs]
    fenced = [Fenced(array, at_end) for array in arrays]
    for copy in fenced[len(inputs) :]:
        copy.poison()
    pointers = (ctypes.c_void_p * len(arrays))(*(copy.array.ctypes.data for copy in fenced))
    result = library.run(*what.groups, what.threads, pointers)
    assert result != WAITS_FOR_EVER, "threads wait for others that never come"
    at = ctypes.c_void_p.in_dll(library, "outside_at").value or 0
    near = [name for name, copy in zip(types, fenced, strict=True) if copy.covers(at)]
    assert result == ENDED, f"{what.name} reads or writes outside of {near or 'all arrays'}"
    return [mx.array(copy.array) for copy in fenced[len(inputs) :]]


class Fenced:
    """A copy of an array, with its strides, in pages of its own between two that may be neither read nor written."""

    def __init__(self, array: np.ndarray[Any, Any], at_end: bool) -> None:
        extent = 1 + sum(
            (n - 1) * stride // array.itemsize for n, stride in zip(array.shape, array.strides, strict=True)
        )
        nbytes, page = (extent if array.size else 0) * array.itemsize, mmap.PAGESIZE
        self._size = -(-nbytes // page) * page + 2 * page
        self._memory = mmap.mmap(-1, self._size)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._bytes = np.frombuffer(self._memory, np.uint8)[page : self._size - page]
        first = len(self._bytes) - nbytes if at_end else 0
        memory = self._bytes[first : first + nbytes].view(array.dtype)
        self.poison()
        self.array = np.lib.stride_tricks.as_strided(memory, array.shape, array.strides)
        if array.size:
            self.array[...] = array
        for fence in (self._start, self._start + self._size - page):
            self._protect(fence, page, 0)

    def poison(self) -> None:
        """Fill the memory with ones: no numbers, where it is of floats, and large ones elsewhere."""
        self._bytes[...] = 0xFF

    def covers(self, address: int) -> bool:
        """Whether an address lies in these pages."""
        return self._start <= address < self._start + self._size

    @staticmethod
    def _protect(start: int, size: int, how: int) -> None:
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert protect(start, size, how) == 0


def _compiled(folder: Path, source: str, level: str) -> Any:
    """The library of a source, which is compiled the first time it is asked for, by whichever process of the tests.

    level: how far it is optimised. A compiler takes longer to optimise most kernels than the tests take to run them as
    they are, and C++'s headers twice as long to read as C's.
    """
    file = folder / f"{sha256(source.encode()).hexdigest()}.cpp"
    library = file.with_suffix(".so")
    if not library.exists():
        with TemporaryDirectory(dir=folder) as own:
            (ours := Path(own) / file.name).write_text(source)
            command = [
                "g++",
                "-std=c++17",
                level,
                *(ON_LINUX if sys.platform == "linux" else ()),
                "-w",
                "-nostdinc++",
                "-shared",
                "-fPIC",
                "-o",
                f"{own}/library",
                ours,
            ]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            assert found.returncode == 0, found.stderr[:4000]
            os.replace(f"{own}/library", library)
    return ctypes.CDLL(str(library))
