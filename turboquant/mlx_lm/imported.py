"""Imports mlx-lm, in less time, and leaves the process with its limit of open files.

When mlx-lm is imported, it lets the process open up to 2,048 files, and sets the hard limit to 4,096. It fails where an
administrator has set a lower hard limit. It imports transformers, which reads the sources of all its models twice, .4
seconds each time, and which warns where there is no PyTorch. Modules that import mlx-lm import this one first.
"""

from __future__ import annotations

import importlib
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


@contextmanager
def _sources_read_once() -> Iterator[None]:
    """In the block, transformers uses what it found when it read the folder of its models' sources.

    `transformers` lists the classes in its folder `models`, and `transformers.models` those in the folder of its
    `__init__.py`, which is the same folder under another name. The list is kept under the first name.
    """
    utils: Any = importlib.import_module("transformers.utils.import_utils")
    find_classes = getattr(utils, "define_import_structure", None)
    if find_classes is None:  # another version of transformers
        yield
        return

    def find_classes_of_folder(path: Any, *rest: Any, **named: Any) -> Any:
        return find_classes(Path(path).parent if Path(path).is_file() else path, *rest, **named)

    utils.define_import_structure = find_classes_of_folder
    try:
        yield
    finally:
        utils.define_import_structure = find_classes


os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # mlx-lm sets it too, but transformers is imported first here
with _hard_limits_kept(), _sources_read_once():
    importlib.import_module("mlx_lm.utils")
