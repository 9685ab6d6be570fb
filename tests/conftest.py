"""Load the tuned BLAS before any test imports MLX, which is ten times slower without it on a Linux CPU.

Each process of the tests uses one thread. There are as many processes as cores, and with more threads than cores they
would run ten times slower.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from turboquant.runtime.blas import load_tuned_blas

load_tuned_blas()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name no test after a file's bytes: archives hold the time, and all processes must collect the same names."""
    return "bytes" if isinstance(val, bytes) else None


settings.register_profile("whatever else the machine does", deadline=None)
settings.load_profile("whatever else the machine does")
