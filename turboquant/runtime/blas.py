"""A tuned BLAS for MLX on a Linux CPU, with no compiler, no root and no extra package.

MLX's Linux CPU wheel links Netlib's reference BLAS: a few GFLOP/s, one thread. `libmlx.so` imports
`cblas_sgemm` and its kin by plain name, and a library loaded with RTLD_GLOBAL before `mlx.core` wins that
lookup. NumPy's wheel already carries OpenBLAS, but under other names and with 64-bit integers; cblas_shim.py lends
its functions the names that MLX looks for.

It knows libraries, threads and dlopen. It does not know models or jobs, it never imports MLX or NumPy but in
`measure_gflops`, and it changes nothing on macOS, with a CUDA backend, or once MLX is loaded.

The environment variable PIPELINE_BLAS picks the library: `numpy`, `system`, or `off` for MLX's own. Unset,
the first of these is taken: one preloaded by the user, NumPy's, the system's. OPENBLAS_NUM_THREADS and
OMP_NUM_THREADS are respected.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path

from turboquant.runtime.cblas_shim import FUNCTIONS, export

SWITCH = "PIPELINE_BLAS"
INSTALL_HINT = "install OpenBLAS (Debian, Ubuntu: apt install libopenblas0-pthread), or NumPy's wheel from PyPI"

_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
# How long OpenBLAS's idle threads spin before they sleep: 2**20 cycles, half a millisecond, in place of 2**26, which
# takes a core from MLX and NumPy between two products. Prefill on two cores took an eighth less time, decoding a sixth.
_IDLE_SPIN = "20"
_TUNED_NAMES = ("openblas", "mkl", "blis", "nvpl", "armpl")
_SYSTEM_LIBRARIES = ("libopenblas.so.0", "libmkl_rt.so.3", "libmkl_rt.so.2", "libmkl_rt.so.1")


@dataclass(frozen=True)
class Blas:
    """The matrix library MLX uses on this machine."""

    name: str
    path: str | None
    threads: int
    tuned: bool
    hint: str | None


@cache
def load_tuned_blas() -> Blas:
    """Make MLX use a tuned BLAS where its own is slow; call it before anything imports `mlx.core`.

    Never raises: where nothing better can be had, the result says so (`tuned` is False, `hint` is the fix).

    >>> load_tuned_blas().threads >= 1
    True
    """
    if sys.platform != "linux":
        return Blas("Accelerate", None, usable_cpus(), sys.platform == "darwin", None)
    if not _mlx_is_cpu_wheel():
        return Blas("the one MLX was built with", None, usable_cpus(), True, None)
    threads, choice = set_threads(), os.environ.get(SWITCH, "")
    if choice == "off":
        return _netlib(f"unset {SWITCH}")
    if choice not in ("", "numpy", "system"):
        return _netlib(f"{SWITCH} is {choice!r}; it may be numpy, system or off")
    if preloaded := _global_gemm():
        return _preloaded(preloaded, threads)
    if "mlx.core" in sys.modules:
        return _netlib("call load_tuned_blas() before anything imports mlx")
    found = _load_from_numpy(threads) if choice != "system" else None
    if found is None and choice != "numpy":
        found = _load_from_system(threads)
    return found or _netlib(INSTALL_HINT)


def set_threads() -> int:
    """Tell OpenBLAS to use the usable CPUs, unless the user has set a number; return the number in force.

    Oversubscription is dear: two processes of two threads each on two cores ran ten times slower than with
    one each. OpenBLAS itself counts the CPUs of the machine, not of its container.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", _IDLE_SPIN)
    for variable in _THREAD_VARIABLES:
        if (value := os.environ.get(variable, "")).isdigit() and int(value) > 0:
            return int(value)
    threads = usable_cpus()
    os.environ["OPENBLAS_NUM_THREADS"] = str(threads)
    return threads


def usable_cpus() -> int:
    """CPUs this process may use: its affinity mask, cut to the quota of its container (cgroup)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *_cgroup_quotas()]))


def measure_gflops(size: int = 1024, seconds: float = 0.5) -> float:
    """Best rate, in GFLOP/s, of float32 `size` x `size` matrix products on MLX's default device."""
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


def _preloaded(path: str, threads: int) -> Blas:
    """What the user loaded globally wins every later lookup, so all that is left is to name it."""
    real = os.path.realpath(path)
    tuned = any(name in real.lower() for name in _TUNED_NAMES)
    hint = None if tuned else f"{path} is preloaded and hides faster ones; take it out of LD_PRELOAD"
    return Blas(f"{Path(real).name} (preloaded)", real, threads, tuned, hint)


def _mlx_is_cpu_wheel() -> bool:
    """The wheels overwrite each other's files, so with both installed there is no telling: leave it alone."""
    return _is_installed("mlx-cpu") and not any(map(_is_installed, ("mlx-cuda-12", "mlx-cuda-13")))


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _cgroup_quotas() -> Iterator[int]:
    """Whole CPUs allowed by each cgroup (version 2) around this process; none where there is no limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    root = Path("/sys/fs/cgroup")
    inner = next((root / line[3:].lstrip("/") for line in lines if line.startswith("0::")), root)
    for folder in (inner, *inner.parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            yield int(quota) // int(period)


# ---- choosing a library


def _load_from_numpy(threads: int) -> Blas | None:
    if platform.machine() != "x86_64":
        return None
    spec = util.find_spec("numpy")  # located, not imported: OpenBLAS reads its thread count when it is loaded
    if spec is None or spec.origin is None:
        return None
    for path in sorted(Path(spec.origin).parents[1].glob("numpy.libs/*openblas*.so*")):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        for pattern in ("scipy_cblas_{}64_", "cblas_{}64_"):
            addresses = {name: _address(library, pattern.format(name[6:])) for name in FUNCTIONS}
            if all(addresses.values()) and export(addresses):
                _set_openblas_threads(library, threads)
                return Blas("OpenBLAS of NumPy", str(path), threads, True, None)
    return None


def _load_from_system(threads: int) -> Blas | None:
    """A library of the system, or of this Python's own prefix (conda, the `mkl` wheel), by plain dlopen."""
    for name in _SYSTEM_LIBRARIES:
        for candidate in (name, f"{sys.prefix}/lib/{name}"):
            try:
                if _address(ctypes.CDLL(candidate), "cblas_sgemm"):  # checked before it becomes global
                    ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
                    return Blas(f"{name} of the system", _global_gemm(), threads, True, None)
            except OSError:
                continue
    return None


def _set_openblas_threads(library: ctypes.CDLL, threads: int) -> None:
    """Only matters where NumPy was imported first: then the environment came too late."""
    for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_"):
        if hasattr(library, name):
            getattr(library, name)(threads)


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
    """The file of the `cblas_sgemm` a library loaded from now on would get, if there is one."""
    process = ctypes.CDLL(None)
    address, info = _address(process, "cblas_sgemm"), _DlInfo()
    if address is None or not process.dladdr(ctypes.c_void_p(address), ctypes.byref(info)):
        return None
    return os.fsdecode(info.path)
