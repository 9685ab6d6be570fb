"""A process that a fault of the GPU ended is told as that, with the driver's line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.execution import processes
from pipeline.execution.gpu_faults import find_gpu_fault, has_nvidia_driver
from pipeline.execution.processes import SPAWN, cause_of_death

FAULT = (
    "Xid (PCI:0000:00:07): 31, pid={pid}, name=python3, Ch 00000008, intr 00000000. MMU Fault: ENGINE GRAPHICS "
    "GPCCLIENT_T1_0 faulted @ 0x7f1c_22000000. Fault is of type FAULT_PDE ACCESS_TYPE_VIRT_READ"
)


def log_of(folder: Path, *records: str) -> Path:
    """A log of the kernel, with lines that other parts of it wrote."""
    path = folder / "kmsg"
    lines = ["6,1,100,-;Linux version 6.18", *records, "6,9,99000000,-;eth0: link up", " SUBSYSTEM=net"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_fault_of_a_process_is_found_by_its_number(tmp_path: Path) -> None:
    log = log_of(
        tmp_path,
        f"3,2,50000000,-;NVRM: {FAULT.format(pid=7)}",
        f"3,3,51000000,-;NVRM: {FAULT.format(pid=8)}",
    )
    assert find_gpu_fault(8, 45.0, log) == FAULT.format(pid=8)
    assert find_gpu_fault(9, 45.0, log) is None


def test_a_fault_before_the_process_started_is_not_its_own(tmp_path: Path) -> None:
    log = log_of(tmp_path, f"3,2,50000000,-;NVRM: {FAULT.format(pid=7)}")
    assert find_gpu_fault(7, 60.0, log) is None
    assert find_gpu_fault(7, 52.0, log) == FAULT.format(pid=7)  # the two clocks may differ a little


def test_a_fault_that_names_no_process_counts(tmp_path: Path) -> None:
    lost = "Xid (PCI:0000:00:07): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
    assert find_gpu_fault(7, 0.0, log_of(tmp_path, f"3,2,50000000,-;NVRM: {lost}")) == lost


def test_a_log_that_cannot_be_read_has_no_faults(tmp_path: Path) -> None:
    assert find_gpu_fault(7, 0.0, tmp_path / "missing") is None
    assert not has_nvidia_driver(tmp_path / "missing")


@pytest.mark.parametrize(
    ("fault", "driver", "told"),
    [
        ("Xid (PCI:0000:00:07): 31", True, "after a fault of the GPU: Xid (PCI:0000:00:07): 31"),
        (None, True, "probably out of memory or after a fault of the GPU; `dmesg` may have a line"),
        (None, False, "probably out of memory"),
    ],
)
def test_an_abort_is_told_as_what_is_known_of_it(
    fault: str | None, driver: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "find_gpu_fault", lambda pid, since: fault)
    monkeypatch.setattr(processes, "has_nvidia_driver", lambda: driver)
    started = time.monotonic()
    process = SPAWN.Process(target=os.abort)
    process.start()
    assert cause_of_death(process, started).startswith(f"was killed by signal 6 (SIGABRT), {told}")
