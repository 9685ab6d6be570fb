"""Imports mlx-lm, and leaves the process with its limit of open files.

When mlx-lm is imported, it lets the process open up to 2,048 files, and sets the hard limit to 4,096. It fails where an
administrator has set a lower hard limit. Modules that import mlx-lm import this one first.
"""

from __future__ import annotations

import importlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _hard_limits_kept() -> Iterator[None]:
    """In the block, only soft limits are changed: they grow as far as the hard limits allow."""
    set_limits = resource.setrlimit

    def raise_soft_limit(kind: int, wanted: tuple[int, int]) -> None:
        soft, hard = resource.getrlimit(kind)
        if resource.RLIM_INFINITY not in (soft, wanted[0]) and soft < wanted[0]:
            set_limits(kind, (wanted[0] if hard == resource.RLIM_INFINITY else min(wanted[0], hard), hard))

    resource.setrlimit = raise_soft_limit
    try:
        yield
    finally:
        resource.setrlimit = set_limits


with _hard_limits_kept():
    importlib.import_module("mlx_lm.utils")
