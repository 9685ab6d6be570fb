"""Makes a loaded mlx-lm model call a cache's own attention, and undoes it.

mlx-lm's model files import ``scaled_dot_product_attention`` by name and call it with the cache. ``enabled(model)``
rebinds that name, in the modules the model is made of, to a function that asks the cache first: one with a method
``attend`` computes attention itself, every other goes to mlx-lm's own function. Knows nothing of what ``attend`` does;
which models can do without K/V handed to them is families.py's.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models import base

from turboquant.mlx_lm.families import explain

NAME = "scaled_dot_product_attention"
_stock = base.scaled_dot_product_attention


@contextlib.contextmanager
def enabled(model: Module) -> Iterator[None]:
    """While the block runs, ``model`` calls a cache's own ``attend`` where the cache has one.

    May be nested; the outermost exit restores mlx-lm's function. With caches of mlx-lm's own the logits stay
    bit-identical.
    """
    rebound = [module for module in _modules(model) if vars(module).get(NAME) is _stock]
    del model  # a server may drop it, and load another, while the block runs
    for module in rebound:
        setattr(module, NAME, _attention)
    try:
        yield
    finally:
        for module in rebound:
            setattr(module, NAME, _stock)


def compressible_layers(model: Module) -> list[bool]:
    """For each layer's cache, whether its K/V can be kept compressed; ``families.explain`` says why not."""
    return list(explain(model).layers)


def _attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    attend = getattr(cache, "attend", None)
    if attend is None:
        attend = functools.partial(_stock, cache=cache)
    output: mx.array = attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    return output


def _modules(model: Module) -> list[ModuleType]:
    parts: list[Module] = model.modules()  # type: ignore[no-untyped-call]
    names = {type(part).__module__ for part in parts}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]
