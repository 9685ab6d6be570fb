"""The CPUs and the memory that the limits of a container leave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from turboquant.runtime import machine
from turboquant.runtime.machine import usable_cpus, usable_memory


def write_limits(folder: Path, cpu: str, memory: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(f"{cpu}\n")
    (folder / "memory.max").write_text(f"{memory}\n")


@pytest.fixture(autouse=True)
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cgroups of a process on a machine with eight CPUs and 16 GB."""
    (tmp_path / "own").write_text("1:cpu:/old\n0::/pod/container\n")
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4000, "SC_PHYS_PAGES": 4_000_000}.__getitem__)
    return tmp_path / "cgroup"


def test_without_limits_all_of_the_machine_may_be_used(cgroups: Path) -> None:
    assert (usable_cpus(), usable_memory()) == (8, 16_000_000_000)
    write_limits(cgroups / "pod" / "container", "max 100000", "max")
    assert (usable_cpus(), usable_memory()) == (8, 16_000_000_000)
    machine.OWN_CGROUP.unlink()
    assert (usable_cpus(), usable_memory()) == (8, 16_000_000_000)


@pytest.mark.parametrize("limited", [".", "pod", "pod/container"])
def test_the_smallest_limit_on_the_way_up_counts(cgroups: Path, limited: str) -> None:
    for folder in (".", "pod", "pod/container"):
        write_limits(cgroups / folder, "600000 100000", "9000000000")
    write_limits(cgroups / limited, "250000 100000", "3000000000")
    assert (usable_cpus(), usable_memory()) == (2, 3_000_000_000)


def test_part_of_a_cpu_is_one_cpu(cgroups: Path) -> None:
    write_limits(cgroups, "50000 100000", "max")
    assert usable_cpus() == 1
