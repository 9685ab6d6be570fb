"""The time that work takes in this process, and the memory. Knows MLX's counters and the kernel's; not the work."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from turboquant.runtime.device import on_cpu

_PROC = Path("/proc/self")


class ResourceMeter:
    """Time and memory from when it is made: that of MLX's arrays on a GPU, all resident memory on a CPU.

    Where the kernel can't forget an earlier peak, as without Linux's /proc, a smaller one since then does not show.
    """

    def __init__(self) -> None:
        mx.clear_cache()
        if on_cpu():
            with suppress(OSError):
                (_PROC / "clear_refs").write_text("5")  # VmHWM becomes VmRSS; man 5 proc
            self._held = _resident_bytes("VmRSS")
        else:
            mx.reset_peak_memory()
            self._held = mx.get_active_memory()
        self._started = time.monotonic()

    def read(self) -> tuple[float, int, int]:
        """Seconds, the peak in bytes, and how much of that is beyond what was held at first."""
        seconds = time.monotonic() - self._started
        peak = _resident_bytes("VmHWM") if on_cpu() else mx.get_peak_memory()
        return seconds, peak, max(0, peak - self._held)


def _resident_bytes(name: str) -> int:
    """A figure of /proc/self/status in bytes; where there is none, the process's peak."""
    with suppress(OSError):
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
