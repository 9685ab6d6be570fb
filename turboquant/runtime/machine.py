"""The CPUs and the memory that this process may use, on its machine or in its container."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

OWN_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Count the CPUs that this process may use: its affinity mask, cut to the quotas of its cgroups (version 2)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *(quota // period for quota, period in _limits("cpu.max"))]))


def usable_memory() -> int:
    """Return the bytes of memory of the machine, or the smallest limit of its cgroups (version 2) if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for (limit,) in _limits("memory.max"))])


def _limits(file: str) -> list[list[int]]:
    """Return the numbers in this file of the process's cgroup and of those around it, of each that has a limit."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    inner = next((CGROUPS / line[3:].lstrip("/") for line in lines if line.startswith("0::")), CGROUPS)
    found = []
    for folder in (inner, *inner.parents):
        with suppress(OSError, ValueError):  # no such file, or "max" in place of a number
            found.append([int(number) for number in (folder / file).read_text().split()])
    return found
