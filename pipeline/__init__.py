"""Answer many queries about each of many long documents, from one compressed prompt cache per document.

`run`, `plan`, `result` and `load_job` do what the commands do; docs/python.md shows them. They are imported when they
are first used, so that `import pipeline` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from turboquant.runtime.versions import __version__ as __version__

if TYPE_CHECKING:
    from pipeline.api import Result as Result
    from pipeline.api import load_job as load_job
    from pipeline.api import plan as plan
    from pipeline.api import result as result
    from pipeline.api import run as run

_API = ("Result", "load_job", "plan", "result", "run")


def __getattr__(name: str) -> Any:
    """Return a function of the API."""
    if name not in _API:
        raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
    return getattr(import_module("pipeline.api"), name)
