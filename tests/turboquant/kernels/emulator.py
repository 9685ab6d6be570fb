"""Runs the GPU kernels' text as C++, thread by thread (emulate.h), in place of ``launch``."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant.kernels.launch import Launch, defines, text

TYPES = {
    mx.float32: "float",
    mx.float16: "half",
    mx.uint32: "u32",
    mx.int32: "int",
    mx.uint8: "u8",
    mx.bool_: "bool",
}
POISON = {mx.float32: (np.float32, np.nan), mx.float16: (np.float16, np.nan), mx.uint32: (np.uint32, 2**32 - 1)}
EMULATOR = (Path(__file__).parent / "emulate.h").read_text(encoding="utf-8")


def emulated_launch(folder: Path, backend: str, what: Launch, inputs: list[mx.array]) -> list[mx.array]:
    """As ``launch``, with lanes as ``backend`` has them and outputs poisoned; ``folder`` keeps what is compiled."""
    types = {name: f"const {TYPES[x.dtype]}*" for name, x in zip(what.inputs, inputs, strict=True)}
    types |= {name: f"{TYPES[dtype]}*" for name, _, dtype in what.outputs}
    source = defines(what.constants)
    source += ("#define METAL_LANES\n" if backend == "metal" else "") + EMULATOR
    source += "".join(text(file) for file in what.headers)
    source += "".join(f"static {kind} {key};\n" for key, kind in types.items())
    if what.strided:
        source += "".join(f'extern "C" {{ long long {x}_shape[8], {x}_strides[8]; }}\n' for x in what.inputs)
    source += "static void body() {\n" + text(f"{what.name}.h") + "}\n"
    source += 'extern "C" bool run(int groups_x, int groups_y, int groups_z, int threads, void** arrays) {\n'
    source += "".join(f"{key} = ({kind})arrays[{i}];\n" for i, (key, kind) in enumerate(types.items()))
    source += "return run_groups(groups_x, groups_y, groups_z, threads);\n}\n"
    library = _compiled(folder, source)
    arrays = [np.asarray(x) if what.strided else np.ascontiguousarray(np.array(x)) for x in inputs]
    for name, array in zip(what.inputs, arrays, strict=True) if what.strided else ():
        for of, numbers in ("shape", array.shape), ("strides", [n // array.itemsize for n in array.strides]):
            found = (ctypes.c_longlong * 8).in_dll(library, f"{name}_{of}")
            found[: array.ndim] = numbers
    for _, shape, dtype in what.outputs:
        kind, poison = POISON[dtype]
        arrays.append(np.full(shape, poison, kind))
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    assert library.run(*what.groups, what.threads, pointers), "threads wait for others that never come"
    return [mx.array(array) for array in arrays[len(inputs) :]]


def _compiled(folder: Path, source: str) -> Any:
    """The library of a source, which is compiled the first time it is asked for."""
    file = folder / f"{abs(hash(source)):x}.cpp"
    library = file.with_suffix(".so")
    if not library.exists():
        file.write_text(source)
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", library, file]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr[:4000]
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_bool
    return loaded
