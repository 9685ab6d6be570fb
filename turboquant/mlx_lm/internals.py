"""Everything in turboquant that depends on how mlx-lm works inside.

All other modules import mlx-lm's names from here, and leave to the functions here what needs a field that mlx-lm does
not document. Only kernels_ahead.py loads a file of mlx-lm's by itself, that of the activations, since to import mlx-lm
takes seconds. The contract test (tests/turboquant/mlx_lm/test_contract) states each assumption; it fails with a
sentence that says which one no longer holds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import turboquant.mlx_lm.imported  # noqa: F401, before mlx-lm's own modules

# isort: split
import mlx.core as mx
from mlx_lm import load
from mlx_lm.models import base
from mlx_lm.models import cache as cache_module
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import quantized_scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache, BatchKVCache, CacheList, KVCache, QuantizedKVCache, make_prompt_cache
from mlx_lm.utils import dequantize_model

__all__ = [
    "ATTENTION",
    "LOADERS",
    "MODELS",
    "STOCK_ATTENTION",
    "STOCK_CACHES",
    "STOCK_SWIGLU",
    "SWIGLU",
    "ArraysCache",
    "BatchKVCache",
    "CacheList",
    "KVCache",
    "QuantizedKVCache",
    "allocate_once",
    "cache_from_state",
    "command_modules",
    "dequantize_model",
    "drop_oldest",
    "generate_is_verbose",
    "kv_cache",
    "load",
    "make_prompt_cache",
    "quantized_scaled_dot_product_attention",
    "release",
    "tokens_held",
    "widen",
]

# ---- names

MODELS = "mlx_lm.models"  # the package of the model files
# Each model file imports this function by name, and calls it with the layer's cache.
ATTENTION = "scaled_dot_product_attention"
STOCK_ATTENTION = base.scaled_dot_product_attention
# Most model files import this function by name too.
SWIGLU = "swiglu"
STOCK_SWIGLU: Callable[[mx.array, mx.array], mx.array] = swiglu
# The functions that the modules of mlx-lm's commands load models with; each module has at least one of them.
LOADERS = ("load", "sharded_load")


def command_modules(command: str) -> list[ModuleType]:
    """Return the module of ``mlx_lm.<command>``, and the other modules whose functions it loads models and caches with.

    Each makes its caches with a function of its own named ``make_prompt_cache``.
    """
    return [importlib.import_module(name) for name in dict.fromkeys((f"mlx_lm.{command}", "mlx_lm.generate"))]


def generate_is_verbose(arguments: Sequence[str]) -> bool:
    """Whether ``mlx_lm.generate`` prints more than the answer when it is run with these arguments."""
    from mlx_lm.generate import setup_arg_parser

    return bool(setup_arg_parser().parse_args(arguments).verbose)


# ---- caches of keys and values


def kv_cache(keys: mx.array, values: mx.array) -> KVCache:
    """Return a cache that holds keys and values (1, n_kv_heads, T, head_dim), without room for more."""
    cache = KVCache()
    cache.state = (keys, values, keys.shape[2])
    return cache


def release(cache: KVCache) -> None:
    """Empty a cache. Its memory is freed as soon as no other object holds its arrays."""
    cache.keys = cache.values = None
    cache.offset = 0


def allocate_once(cache: KVCache, tokens: int) -> None:
    """Make an empty cache allocate room for ``tokens`` tokens at its first update, and not a few at a time."""
    cache.step = max(1, tokens)


def widen(cache: KVCache | BatchKVCache, dtype: mx.Dtype) -> None:
    """Convert what a cache holds to ``dtype`` if that is larger: tokens that are added get the dtype that it holds."""
    if cache.keys is not None and cache.keys.dtype.size < dtype.size:
        cache.keys, cache.values = cache.keys.astype(dtype), cache.values.astype(dtype)


def drop_oldest(cache: BatchKVCache, tokens: Sequence[int], unused: int) -> None:
    """Drop the first ``tokens[row]`` tokens of each row of a batch.

    They become padding on the left. unused: the columns that are then padding in all rows, which are cut off.
    """
    dropped = mx.array(list(tokens))
    cache.offset = cache.offset - dropped
    cache.left_padding = cache.left_padding + dropped - unused
    cache.keys, cache.values = cache.keys[:, :, unused:], cache.values[:, :, unused:]
    cache._idx -= unused


# ---- caches in files

# The kinds of mlx-lm's caches that a file may hold. The list is fixed: no class is looked up by a name from a file.
STOCK_CACHES = {
    name: getattr(cache_module, name)
    for name in ("KVCache", "RotatingKVCache", "ArraysCache", "ChunkedKVCache", "CacheList")
}


def cache_from_state(kind: Any, state: Any) -> Any:
    """Return a cache of mlx-lm's, of class ``STOCK_CACHES[kind]``, from the ``state`` of another one.

    Raises KeyError for another kind, and ValueError where the state is not one that a cache of this kind can have.
    """
    if kind == "CacheList":  # mlx-lm's own loader would take any name in its module for a class
        return CacheList(*(cache_from_state(name, own) for own, name in state))
    cache = STOCK_CACHES[kind].from_state(state)
    if isinstance(cache, ArraysCache):
        arrays = [*cache.cache, cache.left_padding, cache.lengths]
        if not all(x is None or isinstance(x, mx.array) for x in arrays):
            raise ValueError(f"the state of a {kind} holds something else than arrays")
        return cache
    counts = [value for name, value in vars(cache).items() if name not in ("keys", "values")]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"the state of a {kind} has a count that is not a whole number of 0 or more")
    capacity = _capacity(cache.keys, cache.values)
    largest = getattr(cache, "max_size", cache.offset)
    held = min(cache.offset, largest) - getattr(cache, "start_position", 0)
    if not 0 <= held <= capacity or getattr(cache, "_idx", 0) > capacity or getattr(cache, "keep", -1) >= largest:
        raise ValueError(f"the state of a {kind} counts more tokens than it holds")
    return cache


def tokens_held(cache: Any) -> set[int]:
    """Return the number of tokens that a cache of mlx-lm's counts: several for a ``CacheList``, none if none counts."""
    if isinstance(cache, CacheList):
        return set().union(*map(tokens_held, cache.caches))
    return {cache.offset} if hasattr(cache, "offset") else set()


def _capacity(keys: Any, values: Any) -> int:
    """Return the tokens that keys and values have room for. Raises ValueError unless they are arrays that fit together,
    or both None.
    """
    if keys is None and values is None:
        return 0
    if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
        raise ValueError("keys and values are not arrays")
    if not keys.ndim == values.ndim == 4 or keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
        raise ValueError(f"keys {keys.shape} and values {values.shape} don't fit together")
    if not mx.issubdtype(keys.dtype, mx.floating):
        raise ValueError(f"keys are {keys.dtype}, not floating-point numbers")
    return int(keys.shape[2])
