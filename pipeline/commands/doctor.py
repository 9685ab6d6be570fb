"""What this machine has for a run, how fast it is, and what to fix.

It looks and measures; it changes nothing. It knows versions, devices, the BLAS, memory and disk, not jobs,
models or the store.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from turboquant.runtime.blas import Blas, blas_in_use, measure_gflops, usable_cpus

DISTRIBUTION = "turboquant-pipeline"
DEPENDENCIES = ("mlx", "mlx-lm", "numpy", "pyarrow")
# Between Netlib's 2 to 5 and the 35 (AVX2) to 100 (AVX-512) of a tuned BLAS.
LEAST_GFLOPS_A_CORE = 20
LEAST_FREE_DISK = 10e9


@dataclass(frozen=True)
class Check:
    """One finding: `ok` is None where there is nothing to judge, `fix` says what to do where it is False."""

    name: str
    value: str
    ok: bool | None = None
    fix: str | None = None


def examine(cache_dir: Path = Path(".cache")) -> list[Check]:
    """Look at everything, in the order a reader wants it. Takes about two seconds, mostly to measure.

    `cache_dir` need not exist yet.
    """
    blas = blas_in_use()
    checks = [Check("Python", f"{platform.python_version()} ({sys.executable})")]
    checks += [Check("platform", platform.platform()), _check_memory()]
    checks += [_check_version(name) for name in DEPENDENCIES]
    checks += [*_check_device(blas), _check_disk(cache_dir)]
    return checks


def render(checks: Sequence[Check]) -> str:
    """A plain table: a mark, the name, the value, and under it the fix.

    >>> print(render([Check("disk", "1 GB free", False, "free some"), Check("Python", "3.12")]))
    !!  disk    1 GB free
                -> free some
        Python  3.12
    """
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        mark = {True: "ok", False: "!!", None: "  "}[check.ok]
        lines.append(f"{mark}  {check.name:<{width}}  {check.value}")
        if check.fix:
            lines.append(f"    {'':<{width}}  -> {check.fix}")
    return "\n".join(lines)


def as_json(checks: Sequence[Check]) -> str:
    """The same as a JSON list of objects, for scripts and bug reports."""
    return json.dumps([asdict(check) for check in checks], indent=2)


def usable_memory() -> int:
    """Bytes of memory of the machine, or of the container (cgroup version 2) where that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _check_memory() -> Check:
    return Check("CPUs, memory", f"{usable_cpus()} usable CPUs, {usable_memory() / 1e9:.0f} GB")


def _check_version(name: str) -> Check:
    """Against the range that this project's own metadata states, which is the only place it is written."""
    supported = _supported_range(name)
    install = _install_command(name, supported or "")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "not installed", False, install)
    if supported is None:
        return Check(name, version)
    from packaging.specifiers import SpecifierSet

    ok = SpecifierSet(supported).contains(version, prereleases=True)
    return Check(name, f"{version} (supported: {supported})", ok, None if ok else install)


def _install_command(name: str, supported: str) -> str:
    if name == "mlx" and sys.platform != "darwin":
        return f"pip install '{DISTRIBUTION}[cpu]', or [cuda] with an NVIDIA GPU"
    return f"pip install '{name}{supported}'"


def _supported_range(name: str) -> str | None:
    """The range for `name`, or None where this project runs from a checkout that was never installed."""
    from packaging.requirements import Requirement

    try:
        stated = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(item.specifier) for item in map(Requirement, stated) if item.name == name), None)


def _check_device(blas: Blas) -> Iterator[Check]:
    try:
        import mlx.core as mx
    except ImportError as error:
        extra = "" if sys.platform == "darwin" else "; on Linux it is mlx[cpu] or mlx[cuda13]"
        yield Check("device", f"MLX can't be imported: {error}", False, f"reinstall mlx{extra}")
        return
    name = mx.device_info().get("device_name", "unknown")
    if mx.default_device() != mx.Device(mx.cpu):
        kind = "Metal" if mx.metal.is_available() else "CUDA"
        yield Check("device", f"{kind}, {name}", True)
        yield Check("matmul", f"{measure_gflops(4096):,.0f} GFLOP/s in float32")
        yield _check_kernels()
        return
    yield Check("device", f"CPU, {name}")
    where = f" ({blas.path})" if blas.path else ""
    yield Check("BLAS", f"{blas.name}, threads: {blas.threads}{where}", blas.tuned, blas.hint)
    yield _check_speed(blas)


def _check_kernels() -> Check:
    from turboquant import CacheCodec
    from turboquant.attention import gpu as attention_gpu

    ok = attention_gpu.usable(CacheCodec(), 128)
    fix = None if ok else "compressed prefixes are decoded by MLX's operations, which is slower: please report it"
    return Check("attention kernels", "run, and find what MLX's operations find" if ok else "don't run", ok, fix)


def _check_speed(blas: Blas) -> Check:
    rate = measure_gflops()
    ok = rate >= LEAST_GFLOPS_A_CORE * blas.threads
    fix = blas.hint or "free the CPUs of other work, or set OPENBLAS_NUM_THREADS to the number of free ones"
    return Check("matmul", f"{rate:,.0f} GFLOP/s in float32", ok, None if ok else fix)


def _check_disk(cache_dir: Path) -> Check:
    folder = cache_dir.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    fix = None if free >= LEAST_FREE_DISK else "free some, or set cache.dir to a larger disk"
    return Check("disk", f"{free / 1e9:.0f} GB free for {folder}", fix is None, fix)
