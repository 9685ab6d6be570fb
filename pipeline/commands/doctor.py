"""``pipeline doctor``: examine this machine and this installation, measure the speed, and say how to fix problems.

It changes nothing, and it needs no job, no model and no store.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from pipeline.commands.console import table
from turboquant.runtime.blas import Blas, blas_in_use, measure_gflops
from turboquant.runtime.machine import usable_cpus, usable_memory

DISTRIBUTION = "turboquant-pipeline"
PACKAGES = ("pipeline", "turboquant")  # other distributions on PyPI have packages of these names
DEPENDENCIES = ("mlx", "mlx-lm", "numpy", "pyarrow")
# The versions that the tests of every architecture passed with. Other versions of mlx-lm may work otherwise inside.
TESTED = {"mlx": "0.32.4", "mlx-lm": "0.32.2"}
# Netlib's BLAS has 2 to 5 GFLOP/s a core, a tuned BLAS 35 (AVX2) to 100 (AVX-512).
LEAST_GFLOPS_A_CORE = 20
LEAST_FREE_DISK = 10e9


@dataclass(frozen=True)
class Check:
    """One fact. ok: None if it is neither good nor bad. fix: the remedy if ``ok`` is False."""

    name: str
    value: str
    ok: bool | None = None
    fix: str | None = None


def examine(cache_dir: Path = Path(".cache")) -> list[Check]:
    """Return all checks. This takes about two seconds, most of them for measurements.

    cache_dir: a folder on the disk of the store; it need not exist yet.
    """
    blas = blas_in_use()
    checks = [Check("Python", f"{platform.python_version()} ({sys.executable})")]
    checks.append(Check("platform", platform.platform()))
    checks.append(Check("CPUs, memory", f"{usable_cpus()} usable CPUs, {usable_memory() / 1e9:.0f} GB"))
    checks.append(check_installed_files(metadata.distributions()))
    checks += check_folder(Path.cwd())
    checks += [check_version(name) for name in DEPENDENCIES]
    checks += [*_check_device(blas), check_disk(cache_dir)]
    return checks


def render(checks: Sequence[Check]) -> str:
    """Return a table of marks, names and values, with each fix below its value.

    >>> print(render([Check("disk", "1 GB free", False, "free some"), Check("Python", "3.12")]))
    !!  disk    1 GB free
                -> free some
        Python  3.12
    """
    marks = {True: "ok", False: "!!", None: "  "}
    rows: list[tuple[str, str, str]] = []
    for check in checks:
        rows.append((marks[check.ok], check.name, check.value))
        if check.fix:
            rows.append(("", "", f"-> {check.fix}"))
    return table(rows)


def as_json(checks: Sequence[Check]) -> str:
    """Return the checks as a JSON list of objects, for scripts and bug reports."""
    return json.dumps([asdict(check) for check in checks], indent=2)


def check_installed_files(distributions: Iterable[metadata.Distribution]) -> Check:
    """Check that the files of `PACKAGES` are those that were installed with this project.

    Each file is compared with the hash in the project's RECORD. Other distributions with files in these packages are
    named, since the one that is installed last overwrites the files of the other.
    """
    recorded, changed, others = 0, [], set()
    for distribution in distributions:
        name = distribution.metadata["Name"] or "a distribution without a name"
        for file in distribution.files or ():
            if file.parts[0] not in PACKAGES or file.hash is None:
                continue
            if name != DISTRIBUTION:
                others.add(name)
                continue
            recorded += 1
            try:
                digest = hashlib.new(file.hash.mode, Path(file.locate()).read_bytes()).digest()
            except OSError:
                digest = b""
            if base64.urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value:
                changed.append(str(file))
    folders = " and ".join(f"{name}/" for name in PACKAGES)
    if not changed and not others:
        value = f"the {recorded:,} files of {folders} are as installed" if recorded else "run from a source folder"
        return Check("installation", value, True if recorded else None)
    problems = [f"{', '.join(sorted(others))} also has files in {folders}"] if others else []
    if changed:
        problems.append(f"{len(changed):,} of {recorded:,} files of {folders} were changed, such as {min(changed)}")
    reinstall = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
    uninstall = f"pip uninstall -y {' '.join(sorted(others))} && " if others else ""
    return Check("installation", "; ".join(problems), False, uninstall + reinstall)


def check_folder(folder: Path) -> Iterator[Check]:
    """Look in the user's folder for modules that hide this project's from ``python -m`` and from scripts there."""
    for name in PACKAGES:
        if (folder / f"{name}.py").exists():
            hidden = f"{name}.py hides this package from python -m and from scripts beside it"
            yield Check("this folder", hidden, False, f"rename {name}.py; the command pipeline is not affected")


def check_version(name: str) -> Check:
    """Compare the installed version with the range in this project's metadata."""
    supported = supported_range(name)
    install = f"pip install '{name}{supported or ''}'"
    if name == "mlx" and sys.platform != "darwin":
        install = f"pip install '{DISTRIBUTION}[cpu]', or [cuda] with an NVIDIA GPU"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "not installed", False, install)
    if supported is None:
        return Check(name, version)
    from packaging.specifiers import SpecifierSet

    ok = SpecifierSet(supported).contains(version, prereleases=True)
    tested = f"; tested with {TESTED[name]}" if name in TESTED else ""
    return Check(name, f"{version} (supported: {supported}{tested})", ok, None if ok else install)


def supported_range(name: str) -> str | None:
    """Return the supported versions of a dependency, or None if this project is not installed."""
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
        from turboquant import CacheCodec
        from turboquant.attention import gpu as attention_gpu
        from turboquant.attention.dispatch import prepare_kernels
        from turboquant.kernels.compiled_files import compiled_files
        from turboquant.kernels.programs import finish, summary
        from turboquant.kernels.trials import found

        runs = attention_gpu.usable(CacheCodec(), 128)
        slower = "compressed prefixes are decoded by MLX's operations, which is slower: please report it"
        value = "run, and agree with MLX's operations" if runs else "don't run"
        yield Check("attention kernels", value, runs, None if runs else slower)
        prepare_kernels(CacheCodec(), 128, mx.float16)  # an earlier trial counts without them
        if programs := finish():
            days = sorted({program.created[:10] for program in programs})
            made = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
            yield Check("compiled kernels", f"{summary()}; made on {made}; kept in {compiled_files().folder}")
        for what, difference in found().items():
            yield Check("tried", f"{what}: wrong by {difference:.1g} at most")
        return
    yield Check("device", f"CPU, {name}")
    where = f" ({blas.path})" if blas.path else ""
    yield Check("BLAS", f"{blas.name}, threads: {blas.threads}{where}", blas.tuned, blas.hint)
    yield check_speed(blas)


def check_speed(blas: Blas) -> Check:
    """Measure matrix products, and compare their speed with that of a tuned BLAS."""
    rate = measure_gflops()
    ok = rate >= LEAST_GFLOPS_A_CORE * blas.threads
    fix = blas.hint or "free the CPUs of other work, or set OPENBLAS_NUM_THREADS to the number of free ones"
    return Check("matmul", f"{rate:,.0f} GFLOP/s in float32", ok, None if ok else fix)


def check_disk(cache_dir: Path) -> Check:
    """Check the free space of the disk that the store is on."""
    folder = cache_dir.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    fix = None if free >= LEAST_FREE_DISK else "free some, or set cache.dir to a larger disk"
    return Check("disk", f"{free / 1e9:.0f} GB free for {folder}", fix is None, fix)
