"""Give MLX a tuned BLAS on a Linux CPU, with no compiler, no root and no extra package.

MLX's Linux CPU wheel links Netlib's reference BLAS, which reaches a few GFLOP/s on one thread. `libmlx.so` imports
`cblas_sgemm` and a few more functions by plain name, and a library that is loaded with RTLD_GLOBAL before `mlx.core`
wins that lookup. NumPy's wheel already carries OpenBLAS, but under other names and with 64-bit integers; cblas_shim.py
gives its functions the names that MLX looks for.

Nothing changes on macOS, with a CUDA backend, or once MLX is loaded. This module imports neither MLX nor NumPy, except
in `measure_gflops`.

It reads and sets these environment variables:

- TURBOQUANT_BLAS chooses the library: `numpy`, `system`, or `off` for MLX's own. If it is not set, PIPELINE_BLAS, its
  former name, is read. If neither is set, the first of these is used: a library that the user has preloaded, NumPy's,
  the system's.
- OPENBLAS_NUM_THREADS and OMP_NUM_THREADS set the number of threads, in this order.
- OPENBLAS_THREAD_TIMEOUT is set for OpenBLAS, unless the user has set it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path

from turboquant.runtime.cblas_shim import TARGETS, export
from turboquant.runtime.machine import usable_cpus

SWITCH, FORMER_SWITCH = "TURBOQUANT_BLAS", "PIPELINE_BLAS"
INSTALL_HINT = "install OpenBLAS (Debian, Ubuntu: apt install libopenblas0-pthread), or NumPy's wheel from PyPI"

_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
# OpenBLAS's idle threads spin for 2**20 cycles, half a millisecond, before they sleep. With OpenBLAS's default, 2**26,
# they take a core from MLX and NumPy between two products: on two cores prefill took an eighth longer, decode a sixth.
_IDLE_SPIN = "20"
_TUNED_NAMES = ("openblas", "mkl", "blis", "nvpl", "armpl")
_SYSTEM_LIBRARIES = ("libopenblas.so.0", "libmkl_rt.so.3", "libmkl_rt.so.2", "libmkl_rt.so.1")


@dataclass(frozen=True)
class Blas:
    """The matrix library that MLX uses in this process.

    path: of its file, if it is known. threads: how many it uses. tuned: False where it is a slow one.
    hint: for the user, how to get a faster one; None where there is nothing to do.
    """

    name: str
    path: str | None
    threads: int
    tuned: bool
    hint: str | None


@cache
def load_tuned_blas() -> Blas:
    """Make MLX use a tuned BLAS, where its own is slow.

    Every process that computes calls this once, where it starts, before it imports NumPy or MLX: MLX looks up its BLAS
    when `mlx.core` is imported, and OpenBLAS reads its number of threads when NumPy loads it. Other code assumes that
    this was done, and reads `blas_in_use`.

    Returns a description of the library. Never raises: where there is nothing better than MLX's own, `tuned` is False
    and `hint` says what to do.

    >>> load_tuned_blas().threads >= 1
    True
    """
    if sys.platform != "linux":
        return Blas("Accelerate", None, usable_cpus(), sys.platform == "darwin", None)
    # MLX's wheels overwrite each other's files. If two are installed, it is unknown which one is in use.
    if not _is_installed("mlx-cpu") or _is_installed("mlx-cuda-12") or _is_installed("mlx-cuda-13"):
        return Blas("the one MLX was built with", None, usable_cpus(), True, None)
    threads = set_threads()
    variable = SWITCH if os.environ.get(SWITCH) else FORMER_SWITCH
    choice = os.environ.get(variable, "")
    if choice == "off":
        return _netlib(f"unset {variable}")
    if choice not in ("", "numpy", "system"):
        return _netlib(f"{variable} is {choice!r}; it may be numpy, system or off")
    if preloaded := _global_gemm():  # the user's library wins every later lookup
        path = os.path.realpath(preloaded)
        tuned = any(name in path.lower() for name in _TUNED_NAMES)
        hint = None if tuned else f"{preloaded} is preloaded and hides faster ones; take it out of LD_PRELOAD"
        return Blas(f"{Path(path).name} (preloaded)", path, threads, tuned, hint)
    if "mlx.core" in sys.modules:
        return _netlib("call load_tuned_blas() before anything imports mlx")
    found = _load_from_numpy(threads) if choice != "system" else None
    if found is None and choice != "numpy":
        found = _load_from_system(threads)
    return found or _netlib(INSTALL_HINT)


def blas_in_use() -> Blas:
    """Describe the BLAS that MLX uses in this process, which `load_tuned_blas` chose when the process started."""
    return load_tuned_blas()  # cached, so nothing is loaded again


def set_threads() -> int:
    """Make OpenBLAS use the usable CPUs, unless the user has set a number; return the number of threads.

    Too many threads cost much: two processes of two threads each on two cores ran ten times slower than with one
    thread each. OpenBLAS by itself counts the CPUs of the machine, not those of its container.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", _IDLE_SPIN)
    for variable in _THREAD_VARIABLES:
        if (value := os.environ.get(variable, "")).isdigit() and int(value) > 0:
            return int(value)
    threads = usable_cpus()
    os.environ["OPENBLAS_NUM_THREADS"] = str(threads)
    return threads


def measure_gflops(size: int = 1024, seconds: float = 0.5) -> float:
    """Measure float32 `size` x `size` matrix products on MLX's default device; return the best rate in GFLOP/s."""
    import mlx.core as mx

    a, b = (mx.random.uniform(shape=(size, size), key=mx.random.key(seed)) for seed in (0, 1))
    mx.eval(a, b, a @ b)  # the first product also pays for threads and kernels
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def _netlib(hint: str) -> Blas:
    return Blas("Netlib reference BLAS (MLX's own)", None, 1, False, hint)


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


# ---- loading a library


def _load_from_numpy(threads: int) -> Blas | None:
    if platform.machine() != "x86_64":
        return None
    spec = util.find_spec("numpy")  # finds the package without importing it, which would load OpenBLAS
    if spec is None or spec.origin is None:
        return None
    for path in sorted(Path(spec.origin).parents[1].glob("numpy.libs/*openblas*.so*")):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        for pattern in ("scipy_cblas_{}64_", "cblas_{}64_"):
            addresses = {name: _address(library, pattern.format(name[6:])) for name in TARGETS}
            if all(addresses.values()) and export(addresses):
                # If NumPy was imported first, OpenBLAS did not see the environment variable.
                for setter in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_"):
                    if hasattr(library, setter):
                        getattr(library, setter)(threads)
                return Blas("OpenBLAS of NumPy", str(path), threads, True, None)
    return None


def _load_from_system(threads: int) -> Blas | None:
    """Load a library of the system, or of this Python's own prefix (conda, the `mkl` wheel)."""
    for name in _SYSTEM_LIBRARIES:
        for candidate in (name, f"{sys.prefix}/lib/{name}"):
            try:
                if _address(ctypes.CDLL(candidate), "cblas_sgemm"):  # checked before it becomes global
                    ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
                    return Blas(f"{name} of the system", _global_gemm(), threads, True, None)
            except OSError:
                continue
    return None


def _address(library: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value if hasattr(library, name) else None


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _global_gemm() -> str | None:
    """Return the file whose `cblas_sgemm` a library that is loaded from now on would get; None if there is none."""
    process = ctypes.CDLL(None)
    address, info = _address(process, "cblas_sgemm"), _DlInfo()
    if address is None or not process.dladdr(ctypes.c_void_p(address), ctypes.byref(info)):
        return None
    return os.fsdecode(info.path)
