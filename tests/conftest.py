"""Load the tuned BLAS before any test imports MLX, which is ten times slower without it on a Linux CPU.

Each process of the tests uses one thread. There are as many processes as cores, and with more threads than cores they
would run ten times slower. On Linux, each stays on a core of its own: its Python thread hands one small operation after
the other to MLX's thread. Waking that thread on another core takes a fifth of the time of tests that run models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from turboquant.runtime.blas import load_tuned_blas

load_tuned_blas()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name no test after a file's bytes: archives hold the time, and all processes must collect the same names."""
    return "bytes" if isinstance(val, bytes) else None


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pytest_configure() -> None:
    """Keep this process, and the children that it starts, on one core."""
    process = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if process and CORES:
        os.sched_setaffinity(0, {CORES[int(process) % len(CORES)]})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # a thread that wakes interrupts no other


@pytest.fixture(scope="module")
def every_core() -> Iterator[None]:
    """Let children use all cores. Those that wait for each other busily need it."""
    if not CORES:
        yield
        return
    own, policy = os.sched_getaffinity(0), os.sched_getscheduler(0)
    os.sched_setaffinity(0, CORES)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    yield
    os.sched_setaffinity(0, own)
    os.sched_setscheduler(0, policy, os.sched_param(0))


settings.register_profile("whatever else the machine does", deadline=None)
settings.load_profile("whatever else the machine does")
