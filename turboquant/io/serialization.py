"""Encoded layers and mlx-lm's caches, taken apart for a file of tensors and put together from one.

What kinds of cache a file may hold is a fixed list here, never a name taken from the file. Knows nothing of files; what
restores raises one of MALFORMED, with the reason in a few words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ArraysCache, CacheList
from numpy.typing import NDArray

from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.layer import EncodedLayer

STOCK_CACHES = {
    name: getattr(mlx_lm_cache, name)
    for name in ("KVCache", "RotatingKVCache", "ArraysCache", "ChunkedKVCache", "CacheList")
}
MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, OverflowError)


def freeze(state: Any, name: str, tensors: dict[str, mx.array]) -> Any:
    """A cache's state as JSON; arrays go to ``tensors`` and leave their names. Raises TypeError for anything else."""
    if isinstance(state, mx.array):
        tensors[name] = state
        return {"tensor": name}
    if isinstance(state, (list, tuple)):
        return {"items": [freeze(item, f"{name}.{i}", tensors) for i, item in enumerate(state)]}
    if state is None or isinstance(state, (bool, int, float, str)):
        return {"value": state}
    raise TypeError(f"{name} is a {type(state).__name__}, which cannot be stored")


def thaw(state: Mapping[str, Any], tensors: dict[str, mx.array]) -> Any:
    """Undo ``freeze``. Takes out of ``tensors`` what it uses."""
    if "tensor" in state:
        return tensors.pop(state["tensor"])
    if "items" in state:
        return [thaw(item, tensors) for item in state["items"]]
    return state["value"]


def take(prefix: str, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Take the tensors out whose names start with ``prefix``, under their whole names."""
    return {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def restore_layer(prefix: str, tensors: dict[str, mx.array], codec: CacheCodec) -> EncodedLayer:
    """The encoded layer whose tensors' names start with ``prefix``; takes them out of ``tensors``."""
    own = {name.removeprefix(prefix): x for name, x in take(prefix, tensors).items()}
    layer = EncodedLayer.from_tensors(own, codec)
    if layer.tensors().keys() != own.keys():
        raise ValueError(f"an encoded layer has no tensors {sorted(own.keys() - layer.tensors().keys())}")
    if not all(_is_finite(x) for name, x in own.items() if name.endswith(("scales", "mean"))):
        raise ValueError("a scale or a mean is no finite number")
    return layer


def _is_finite(x: mx.array) -> bool:
    """Whether no number is infinite or none, told from the exponents: MLX's own test is slow on a CPU."""
    if x.dtype not in (mx.float16, mx.float32):
        return False
    exponent = 0x7C00 if x.dtype == mx.float16 else 0x7F800000
    bits: NDArray[np.unsignedinteger[Any]] = np.asarray(x).view(np.uint16 if x.dtype == mx.float16 else np.uint32)
    return not ((bits & bits.dtype.type(exponent)) == exponent).any()


def restore_stock(kind: Any, state: Mapping[str, Any], tensors: dict[str, mx.array]) -> Any:
    """A cache of mlx-lm's from its frozen state. Raises ValueError where it could not be gone on with."""
    return _from_state(kind, thaw(state, tensors))


def tokens_held(cache: Any) -> set[int]:
    """The number of tokens that a cache of mlx-lm's counts; of recurrent states, which don't, none."""
    if isinstance(cache, CacheList):
        return set().union(*map(tokens_held, cache.caches))
    return {cache.offset} if hasattr(cache, "offset") else set()


def _from_state(kind: Any, state: Any) -> Any:
    if kind == "CacheList":  # its own loader would take any name in mlx-lm's module for a class
        return CacheList(*(_from_state(name, own) for own, name in state))
    cache = STOCK_CACHES[kind].from_state(state)
    if isinstance(cache, ArraysCache):
        arrays = [*cache.cache, cache.left_padding, cache.lengths]
        if not all(x is None or isinstance(x, mx.array) for x in arrays):
            raise ValueError(f"the state of a {kind} is no arrays")
        return cache
    counts = [value for name, value in vars(cache).items() if name not in ("keys", "values")]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"the state of a {kind} does not count its tokens")
    capacity = check_kv(cache.keys, cache.values)
    largest = getattr(cache, "max_size", cache.offset)
    held = min(cache.offset, largest) - getattr(cache, "start_position", 0)
    if not 0 <= held <= capacity or getattr(cache, "_idx", 0) > capacity or getattr(cache, "keep", -1) >= largest:
        raise ValueError(f"the state of a {kind} counts more tokens than it holds")
    return cache


def check_kv(keys: Any, values: Any) -> int:
    """How many tokens keys and values have room for. Raises ValueError unless they are arrays that fit, or None."""
    if keys is None and values is None:
        return 0
    if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
        raise ValueError("keys and values are no arrays")
    if not keys.ndim == values.ndim == 4 or keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
        raise ValueError(f"keys {keys.shape} and values {values.shape} don't fit together")
    if not mx.issubdtype(keys.dtype, mx.floating):
        raise ValueError(f"keys are {keys.dtype}, no floating-point numbers")
    return int(keys.shape[2])
