"""CUDA kernels that are compiled once on each machine: their source text, their machine code, and their launch.

``mx.fast.precompiled_cuda_kernel`` takes the machine code at every call, and hashes it to find the kernel that it has
loaded before. For 100 KB the hash takes longer than the launch. So if MLX's folder of compiled kernels belongs to this
process (mlx_modules.py), the code is written there, under the name that MLX looks for, and MLX gets a few bytes in
place of the code. This depends on how MLX names its files. A small kernel is tried first; if this does not work, MLX
gets the code itself.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from turboquant.kernels import nvrtc
from turboquant.kernels.compiled_files import compiled_files, key_of
from turboquant.kernels.kernel_text import Beginning, Input, Launch, defines, text
from turboquant.kernels.mlx_modules import own_folder
from turboquant.runtime.device import on_cpu

TYPES = {
    mx.float32: "float",
    mx.float16: "half",
    mx.bfloat16: "bfloat16",
    mx.uint32: "unsigned int",
    mx.int32: "int",
    mx.uint8: "unsigned char",
    mx.bool_: "bool",
}
LARGEST_STRIDE = 2**31 - 1  # scalars are ints
MOST_THREADS = 16
PROBE = "const int index = threadIdx.x;\ny[index] = x[index] + 1.0f;\n"
_log = logging.getLogger(__name__)

Kind = tuple[mx.Dtype, int]  # of an input: dtype and dimensions
Extent = tuple[tuple[int, ...], int | None]  # of an input: the array's shape; of a Beginning also its count


@dataclass(frozen=True)
class Variant:
    """Everything in a launch that decides the compiled code of its kernel."""

    name: str
    constants: tuple[tuple[str, int | float], ...]
    headers: tuple[str, ...]
    inputs: tuple[tuple[str, mx.Dtype, int], ...]
    outputs: tuple[tuple[str, mx.Dtype], ...]


@dataclass(frozen=True)
class Program:
    """A compiled kernel.

    scalars: for each scalar argument, in order: the index of an input, ``shape`` or ``strides``, and the axis.
    origin: ``cache`` or ``compiled``. seconds: the time to read or to compile it. created: when it was compiled.
    stands_for: the bytes that MLX gets in place of the code.
    """

    name: str
    code: bytes
    scalars: tuple[tuple[int, str, int], ...]
    origin: str
    seconds: float
    created: str
    stands_for: bytes


_programs: dict[Variant, Future[Program | None]] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Ready:
    """A launch for inputs of certain kinds: its program, or None, and what MLX gets at each call.

    measured: the inputs whose shapes or strides the program takes. scalars: its scalar arguments, by what ``_extent``
    says of these inputs. A step asks for the same ones in each layer, so they are remembered.
    """

    program: Program | None
    settings: dict[str, Any]
    measured: tuple[int, ...] = ()
    scalars: Callable[..., list[int]] = list


def launch(what: Launch, inputs: Sequence[Input]) -> list[mx.array] | None:
    """Run a kernel and return its outputs, or None if it cannot be compiled here; MLX may then compile it."""
    arrays = [x.whole if isinstance(x, Beginning) else x for x in inputs]
    kinds = tuple([(x.dtype, x.ndim) for x in arrays])
    ready = what.programs.get(kinds)
    if ready is None:
        ready = what.programs[kinds] = _ready(what, kinds)
    if ready.program is None:
        return None
    scalars = ready.scalars(*[_extent(inputs[index]) for index in ready.measured])
    if scalars and max(scalars) > LARGEST_STRIDE:
        return None
    found: list[mx.array] = mx.fast.precompiled_cuda_kernel(inputs=arrays, scalars=scalars, **ready.settings)
    return found


def _ready(what: Launch, kinds: Sequence[Kind]) -> Ready:
    """Wait until a launch is compiled, and note what is the same in all calls of it."""
    variant = variant_of(what, kinds)
    program = _program(variant).result() if variant is not None else None
    if program is None:
        return Ready(None, {})
    settings = {
        "name": program.name,
        "compiled_source": _for_mlx(program),
        "output_shapes": [shape for _, shape, _ in what.outputs],
        "output_dtypes": [dtype for _, _, dtype in what.outputs],
        "grid": (what.groups[0] * what.threads, *what.groups[1:]),
        "threadgroup": (what.threads, 1, 1),
        "shared_memory": what.shared_bytes,
        "ensure_row_contiguous": True,
    }
    measured = tuple(dict.fromkeys(index for index, _, _ in program.scalars))

    @functools.lru_cache(maxsize=64)
    def scalars(*extents: Extent) -> list[int]:
        of = dict(zip(measured, extents, strict=True))
        return [_dimension(of[index], kind, axis) for index, kind, axis in program.scalars]

    return Ready(program, settings, measured, scalars)


def compile_ahead(variants: Iterable[Variant | None]) -> None:
    """Begin to compile kernels, or to read them from the cache, on threads of their own."""
    for variant in variants:
        if variant is not None:
            _program(variant)


def in_use() -> list[Program]:
    """Return the programs that are ready in this process."""
    futures = list(_programs.values())
    return [program for future in futures if future.done() and (program := future.result()) is not None]


def finish() -> list[Program]:
    """Wait for the programs that this process has begun to read or to compile, and return those that are ready."""
    wait(list(_programs.values()))
    return in_use()


def is_hopper() -> bool:
    """Return whether MLX's default device is a GPU of compute capability 9.0, for which kernels are compiled here."""
    return not on_cpu() and _compiles_for_hopper()


@functools.cache
def _compiles_for_hopper() -> bool:
    try:
        return _architecture() == "sm_90a" and bool(nvrtc.version())
    except nvrtc.CannotCompile:
        return False


def summary() -> str | None:
    """Return where this process's kernels came from, for example "9 from the cache"; None if there are none."""
    programs = in_use()
    cached = [program for program in programs if program.origin == "cache"]
    compiled = [program for program in programs if program.origin == "compiled"]
    parts = [f"{len(cached)} from the cache"] if cached else []
    if compiled:
        longest = max(program.seconds for program in compiled)
        parts.append(f"{len(compiled)} compiled, the slowest in {longest:.1f} s")
    return ", ".join(parts) or None


def variant_of(what: Launch, kinds: Sequence[Kind]) -> Variant | None:
    """Return the variant of a launch on inputs of these kinds, or None if a dtype is not in ``TYPES``."""
    if any(dtype not in TYPES for dtype, _ in kinds):
        return None
    used = _used(what.name, what.inputs)
    inputs = tuple(
        (name, dtype, dimensions if name in used else 0)
        for name, (dtype, dimensions) in zip(what.inputs, kinds, strict=True)
    )
    outputs = tuple((name, dtype) for name, _, dtype in what.outputs)
    return Variant(what.name, what.constants, what.headers, inputs, outputs)


def source(variant: Variant, symbol: str) -> tuple[str, tuple[tuple[int, str, int], ...]]:
    """Return the whole source text of a kernel, and its scalar arguments, see ``Program``."""
    body, used = text(f"{variant.name}.h"), _used(variant.name, tuple(name for name, _, _ in variant.inputs))
    arguments = [f"const {TYPES[dtype]}* {name}" for name, dtype, _ in variant.inputs]
    arguments += [f"{TYPES[dtype]}* {name}" for name, dtype in variant.outputs]
    scalars, declared = [], ""
    for index, (name, _, dimensions) in enumerate(variant.inputs):
        for kind in used.get(name, ()):
            numbers = [f"{name}_{kind}_{axis}" for axis in range(dimensions)]
            arguments += [f"int {number}" for number in numbers]
            scalars += [(index, kind, axis) for axis in range(dimensions)]
            declared += f"const size_type {name}_{kind}[] = {{{', '.join(numbers)}}};\n"
    headers = "".join(text(file) for file in ("cuda_types.h", "cuda.h", *variant.headers))
    bounds = "__launch_bounds__(THREADS, GROUPS_AT_ONCE) " if "GROUPS_AT_ONCE" in dict(variant.constants) else ""
    head = f'extern "C" __global__ void {bounds}{symbol}({", ".join(arguments)}) {{\n{declared}'
    return defines(variant.constants) + headers + head + body + "}\n", tuple(scalars)


def _program(variant: Variant) -> Future[Program | None]:
    with _lock:
        future = _programs.get(variant)
        if future is None:
            own_folder()
            future = _programs[variant] = _pool().submit(_build, variant)
    return future


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="kernels")


def _build(variant: Variant) -> Program | None:
    try:
        whole, scalars = source(variant, "SYMBOL")
        return _made(variant.name, whole, scalars)
    except nvrtc.CannotCompile as error:
        _log.info("MLX compiles the kernel %s: %s", variant.name, error)
        return None


def _made(label: str, whole: str, scalars: tuple[tuple[int, str, int], ...] = ()) -> Program:
    """Read a program from the cache, or compile it. The function in the text must be named SYMBOL."""
    begin = time.perf_counter()
    architecture = _architecture()
    key = key_of(whole, architecture, nvrtc.version())
    symbol, files, origin = f"turboquant_{label}_{key[:16]}", compiled_files(), "cache"
    found = files.read(label, key)
    if found is None:
        origin = "compiled"
        code = nvrtc.compile_cubin(whole.replace("SYMBOL", symbol), architecture)
        about = {"architecture": architecture, "nvrtc": nvrtc.version(), "seconds": time.perf_counter() - begin}
        files.write(label, key, code, about)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    else:
        code, created = found[0], str(found[1].get("created", ""))
    seconds, stands_for = time.perf_counter() - begin, f"{symbol} {key}".encode()
    return Program(symbol, code, scalars, origin, seconds, created, stands_for)


def _for_mlx(program: Program) -> bytes:
    """Return the bytes that MLX gets for a kernel: its code, or a few bytes if MLX finds the code in its folder."""
    by_name = _is_read_from_folder() and _put_where_mlx_looks(program)
    return program.stands_for if by_name else program.code


def _put_where_mlx_looks(program: Program) -> bool:
    """Write a kernel to MLX's folder under the name that MLX makes from ``stands_for``; return whether it is there.

    MLX reads the file at the first launch. It is written just before that, because the system may remove temporary
    files while a process runs.
    """
    if (folder := own_folder()) is None:
        return False
    path = folder / f"{program.name}_{hash_of(program.stands_for):x}.ptx"
    names = path.with_suffix(".txt")
    if path.exists() and names.exists():
        return True
    try:
        folder.mkdir(exist_ok=True)
        names.write_text(f"{program.name}\t{program.name}\n", encoding="utf-8")
        path.write_bytes(program.code)
    except OSError as error:
        _log.info("a compiled kernel cannot be put into %s: %s", folder, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return False
    return True


def hash_of(data: bytes) -> int:
    """Return ``std::hash`` of a string, as in the GNU C++ library (MurmurHash64A); MLX names its files by it."""
    every, factor = (1 << 64) - 1, 0xC6A4A7935BD1E995
    found, whole = (0xC70F6907 ^ len(data) * factor) & every, len(data) // 8 * 8
    for at in range(0, whole, 8):
        word = int.from_bytes(data[at : at + 8], "little") * factor & every
        found = (found ^ (word ^ word >> 47) * factor & every) * factor & every
    if data[whole:]:
        found = (found ^ int.from_bytes(data[whole:], "little")) * factor & every
    found = (found ^ found >> 47) * factor & every
    return found ^ found >> 47


@functools.cache
def _is_read_from_folder() -> bool:
    """Return whether MLX loads kernels from this process's folder. A small kernel is tried once."""
    if own_folder() is None:
        return False
    try:
        program = _made("probe", f'extern "C" __global__ void SYMBOL(const float* x, float* y) {{\n{PROBE}}}\n')
        if not _put_where_mlx_looks(program):
            return False
        found = mx.fast.precompiled_cuda_kernel(
            name=program.name,
            compiled_source=program.stands_for,
            inputs=[mx.arange(32, dtype=mx.float32)],
            output_shapes=[(32,)],
            output_dtypes=[mx.float32],
            scalars=[],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            ensure_row_contiguous=True,
        )
        return bool(mx.array_equal(found[0], mx.arange(1, 33, dtype=mx.float32)))
    except RuntimeError as error:
        _log.info("MLX is handed the code of kernels at every launch: %s", error)
        return False


@functools.cache
def _architecture() -> str:
    """Return the architecture to compile for, which is MLX's choice: from Hopper on, the one that ends in ``a``."""
    name = str(mx.device_info().get("architecture", ""))
    digits = name.removeprefix("sm_")
    if not digits.isdigit():
        raise nvrtc.CannotCompile(f"an unknown architecture: {name!r}")
    return name + ("a" if int(digits) >= 90 else "")


@functools.cache
def _used(name: str, inputs: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return the inputs of which a kernel's body reads ``shape`` or ``strides``, and which of the two."""
    body = text(f"{name}.h")
    found = {x: tuple(kind for kind in ("shape", "strides") if f"{x}_{kind}" in body) for x in inputs}
    return {x: kinds for x, kinds in found.items() if kinds}


def _extent(x: Input) -> Extent:
    return (tuple(x.whole.shape), x.count) if isinstance(x, Beginning) else (tuple(x.shape), None)


def _dimension(extent: Extent, kind: str, axis: int) -> int:
    """Return one length of an input, or one stride of the contiguous array that holds the input."""
    shape, count = extent
    if kind == "shape":
        return count if count is not None and axis == 2 else shape[axis]
    return math.prod(shape[axis + 1 :])
