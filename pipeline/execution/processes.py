"""Processes that this package starts: how they start, end with their parent, and what they died of.

The parents import this module, so it imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

from pipeline.execution.gpu_faults import find_gpu_fault, has_nvidia_driver

SPAWN = multiprocessing.get_context("spawn")  # not fork: neither Metal nor CUDA survives a fork
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """End this process as soon as its parent ends in any way: otherwise it would keep the lock of the result."""
    if sys.platform == "linux":  # the kernel does it even while a library holds the GIL
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="watch the parent", daemon=True).start()


def keep_pandas_out() -> None:
    """Have pyarrow find no pandas: importing it takes .4 seconds, and no process that this package starts uses it.

    pyarrow imports pandas, where it is installed, before it converts its first value. Its `to_pandas` tries again.
    """
    import pyarrow

    class NoPandas:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name == "pandas":
                raise ModuleNotFoundError("pandas is not needed here", name=name)

    sys.meta_path.insert(0, NoPandas)
    try:
        pyarrow.scalar(0)
    finally:
        sys.meta_path.remove(NoPandas)


def cause_of_death(process: SpawnProcess, started: float) -> str:
    """Wait for a process to end, and explain its exit code, as the end of a sentence that starts with its name.

    started: when it started, by ``time.monotonic``.
    """
    process.join()
    code = process.exitcode or 0
    if code >= 0:
        return f"ended with exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    return f"was killed by signal {-code} ({name}){_guess(-code, process.pid, started)}"


def _guess(number: int, pid: int | None, started: float) -> str:
    if number != signal.SIGABRT:
        return ", probably out of memory" if number == signal.SIGKILL else ""
    if (fault := find_gpu_fault(pid, started)) is not None:
        return f", after a fault of the GPU: {fault}"
    if has_nvidia_driver():
        return ", probably out of memory or after a fault of the GPU; `dmesg` may have a line of the driver with Xid"
    return ", probably out of memory"
