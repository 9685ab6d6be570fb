"""Replace functions in mlx-lm's modules for a while: ``replaced`` does it for all of turboquant.

mlx-lm's model files import ``scaled_dot_product_attention`` by name and call it with the layer's cache.
``enabled(model)`` replaces that name, in the modules that the model is made of, with a function that asks the cache
first: a cache with a method ``attend`` computes attention itself, and any other cache goes to mlx-lm's own function.
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

from turboquant.mlx_lm.internals import ATTENTION, STOCK_ATTENTION


@contextlib.contextmanager
def replaced(*replacements: tuple[ModuleType | type, str, Any]) -> Iterator[None]:
    """While the block runs, give names in modules and classes other values; put the old values back when it ends.

    replacements: (module or class, name, value) for each name, which the module or class must have.
    """
    with contextlib.ExitStack() as stack:
        for module, name, value in replacements:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


@contextlib.contextmanager
def enabled(model: Module) -> Iterator[None]:
    """While the block runs, ``model`` calls the method ``attend`` of each cache that has one.

    Blocks may be nested; the end of the outermost one restores mlx-lm's function. With mlx-lm's own caches the logits
    stay bit-identical.
    """
    modules = [module for module in modules_of(model) if vars(module).get(ATTENTION) is STOCK_ATTENTION]
    del model  # a server may drop it and load another while the block runs
    with replaced(*((module, ATTENTION, _attention) for module in modules)):
        yield


def modules_of(model: Module) -> list[ModuleType]:
    """Return the modules that define the parts of a model, by name."""
    parts: list[Module] = model.modules()  # type: ignore[no-untyped-call]
    names = sorted({type(part).__module__ for part in parts} & sys.modules.keys())
    return [sys.modules[name] for name in names]


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
        attend = functools.partial(STOCK_ATTENTION, cache=cache)
    output: mx.array = attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    return output
