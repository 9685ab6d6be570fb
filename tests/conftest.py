"""Loads the tuned BLAS before any test imports MLX, which would otherwise compute ten times slower on a Linux CPU.

One thread a process: tests run in as many processes as there are cores, and cores that are asked for twice run ten
times slower.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from turboquant.runtime.blas import load_tuned_blas

load_tuned_blas()
settings.register_profile("whatever else the machine does", deadline=None)
settings.load_profile("whatever else the machine does")
