"""The CPUs and the memory that this process may use, on its machine or in its container."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cpus() -> int:
    """Count the CPUs that this process may use: its affinity mask, cut to the quotas of its cgroups (version 2)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return cpus
    root = Path("/sys/fs/cgroup")
    inner = next((root / line[3:].lstrip("/") for line in lines if line.startswith("0::")), root)
    for folder in (inner, *inner.parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            cpus = min(cpus, int(quota) // int(period))
    return max(1, cpus)


def usable_memory() -> int:
    """Return the bytes of memory of the machine, or of the container (cgroup version 2) if that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
