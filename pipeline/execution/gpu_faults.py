"""Find what the NVIDIA driver wrote into the kernel's log when a process ended because of a fault of the GPU.

MLX does not catch such an error, so the process aborts, as it may do without memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

KERNEL_LOG, DRIVER = Path("/dev/kmsg"), Path("/proc/driver/nvidia/version")
MOST_BYTES = 8192  # of a record; Linux's own limit is smaller
CLOCKS_DIFFER = 5.0  # seconds, at most, between the clocks of the kernel's log and of ``time.monotonic``
_RECORD = re.compile(r"\d+,\d+,(\d+),[^;]*;NVRM: (Xid \(.*)")
_PID = re.compile(r"\bpid='?(\d+)")


def find_gpu_fault(pid: int | None, since: float, log: Path = KERNEL_LOG) -> str | None:
    """Return the driver's first line about a fault that ended a process, or None if none is found.

    pid: of the process; lines that name another one do not count. since: when the process started, by
    ``time.monotonic``. The log cannot be read on all machines, nor by all users.
    """
    for record in _records(log):
        if (found := _RECORD.match(record)) is None or int(found[1]) / 1e6 < since - CLOCKS_DIFFER:
            continue
        named = _PID.search(found[2])
        if named is None or int(named[1]) == pid:
            return found[2].strip()
    return None


def has_nvidia_driver(driver: Path = DRIVER) -> bool:
    """Return whether this machine has an NVIDIA GPU, so that an abort may be due to a fault of it."""
    return driver.exists()


def _records(log: Path) -> Iterator[str]:
    """Yield the records of the kernel's log, or none if it cannot be read. A read returns one record of the device."""
    try:
        file = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return
    with open(file, "rb", buffering=0) as records:
        while True:
            try:
                record = records.read(MOST_BYTES)
            except BrokenPipeError:  # the oldest records were overwritten; the next read goes on after them
                continue
            except OSError:
                return
            if not record:  # the end of the log
                return
            yield from record.decode("utf-8", "replace").splitlines()
