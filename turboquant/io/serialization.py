"""Take caches and encoded layers apart into tensors and JSON for a file, and put them together again.

The file may be damaged or forged. The functions that restore raise one of ``MALFORMED``, with a short reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from turboquant.mlx_lm.internals import cache_from_state
from turboquant.quant.cache_codec import CacheCodec
from turboquant.quant.layer import EncodedLayer

MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, OverflowError)


def freeze(state: Any, name: str, tensors: dict[str, mx.array]) -> Any:
    """Return a cache's state as JSON, and add its arrays to ``tensors`` under names that begin with ``name``.

    Raises TypeError for a state that holds anything else than arrays, sequences, numbers, text and None.
    """
    if isinstance(state, mx.array):
        tensors[name] = state
        return {"tensor": name}
    if isinstance(state, (list, tuple)):
        return {"items": [freeze(item, f"{name}.{i}", tensors) for i, item in enumerate(state)]}
    if state is None or isinstance(state, (bool, int, float, str)):
        return {"value": state}
    raise TypeError(f"{name} is a {type(state).__name__}, which cannot be stored")


def thaw(state: Mapping[str, Any], tensors: dict[str, mx.array]) -> Any:
    """Undo ``freeze``, and remove the arrays that it uses from ``tensors``."""
    if "tensor" in state:
        return tensors.pop(state["tensor"])
    if "items" in state:
        return [thaw(item, tensors) for item in state["items"]]
    return state["value"]


def take(prefix: str, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Remove the tensors whose names start with ``prefix`` from ``tensors``, and return them under their full names."""
    return {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def restore_layer(prefix: str, tensors: dict[str, mx.array], codec: CacheCodec) -> EncodedLayer:
    """Return the encoded layer whose tensors' names start with ``prefix``, and remove these from ``tensors``."""
    own = {name.removeprefix(prefix): x for name, x in take(prefix, tensors).items()}
    layer = EncodedLayer.from_tensors(own, codec)
    if layer.tensors().keys() != own.keys():
        raise ValueError(f"an encoded layer has no tensors {sorted(own.keys() - layer.tensors().keys())}")
    if not all(_is_finite(x) for name, x in own.items() if name.endswith(("scales", "mean"))):
        raise ValueError("a scale or a mean is not a finite number")
    return layer


def restore_stock(kind: Any, state: Mapping[str, Any], tensors: dict[str, mx.array]) -> Any:
    """Return a cache of mlx-lm's from its frozen state. See ``cache_from_state`` for ``kind``."""
    return cache_from_state(kind, thaw(state, tensors))


def _is_finite(x: mx.array) -> bool:
    """Whether no element is infinite or NaN, tested by the exponents, since MLX's own test is slow on a CPU."""
    if x.dtype not in (mx.float16, mx.float32):
        return False
    exponent = 0x7C00 if x.dtype == mx.float16 else 0x7F800000
    bits: NDArray[np.unsignedinteger[Any]] = np.asarray(x).view(np.uint16 if x.dtype == mx.float16 else np.uint32)
    return not ((bits & bits.dtype.type(exponent)) == exponent).any()
