"""TurboQuant: K/V-cache compression for MLX, by rotation and Lloyd-Max codes, with attention on the codes.

The names below are imported when first used: those that need mlx-lm take two seconds to come, and a program that
only wants a codec or a key should not wait for them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turboquant.cache import Fork
    from turboquant.codec import CacheCodec, Codec, Encoded
    from turboquant.dispatch import enabled
    from turboquant.layer import EncodedLayer
    from turboquant.prefix import Prefix, prefill
    from turboquant.streaming import TurboQuantKVCache

_HOMES = {
    "CacheCodec": "codec",
    "Codec": "codec",
    "Encoded": "codec",
    "EncodedLayer": "layer",
    "Fork": "cache",
    "Prefix": "prefix",
    "TurboQuantKVCache": "streaming",
    "enabled": "dispatch",
    "prefill": "prefix",
}

__all__ = [
    "CacheCodec",
    "Codec",
    "Encoded",
    "EncodedLayer",
    "Fork",
    "Prefix",
    "TurboQuantKVCache",
    "enabled",
    "prefill",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'turboquant' has no attribute '{name}'")
    return getattr(importlib.import_module(f"turboquant.{_HOMES[name]}"), name)
