"""TurboQuant compresses K/V caches for MLX by a rotation and Lloyd-Max codes, and attends to the codes.

A ``Codec`` compresses vectors. A ``CacheCodec`` describes how keys and values are compressed:

    >>> encoded = Codec(head_dim=128, bits=4).encode(mx.random.normal((2, 100, 128)))
    >>> codec = CacheCodec(key_bits=4, value_bits=3)

``make_prompt_cache`` returns a cache that compresses itself as it grows, for a model loaded by ``mlx_lm.load``. Inside
of ``enabled`` the model attends to the compressed cache; afterwards the model is unchanged:

    >>> cache = make_prompt_cache(model, codec)
    >>> with enabled(model):
    ...     answer = [token for token, _ in generate_step(prompt, model, prompt_cache=cache, max_tokens=8)]

``compress`` compresses a cache of mlx-lm's that is already filled:

    >>> cache = compress(filled, codec, model)

``prefill`` compresses a context that many queries share, also in one batch. Each query then needs memory only for its
own tokens:

    >>> prefix = prefill(model, context, codec)
    >>> with enabled(model):
    ...     batch = BatchGenerator(model, max_tokens=4)
    ...     numbers = batch.insert([[5], [6, 7]], caches=[prefix.fork(), prefix.fork()])
    ...     responses = batch.next_generated()

Files are written atomically and verified when they are loaded, which may raise PromptCacheError. ``save_prompt_cache``
takes forks too:

    >>> save_prompt_cache("cache.safetensors", cache, {"model": "a name"})
    >>> cache, metadata = load_prompt_cache("cache.safetensors", return_metadata=True)

The commands of mlx-lm with compressed caches are ``python -m turboquant.generate``, ``.chat`` and ``.server``, and
``python -m turboquant.fidelity`` measures how compression changes a model's predictions. The names below are imported
when they are first used, since importing mlx-lm takes two seconds, which a program that needs only a codec saves.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turboquant.caches.fork import Fork
    from turboquant.caches.prefix import Prefix, prefill
    from turboquant.caches.streaming import TurboQuantKVCache
    from turboquant.io.prompt_cache import (
        PromptCacheError,
        compress,
        load_prompt_cache,
        make_prompt_cache,
        save_prompt_cache,
    )
    from turboquant.kernels.encoding import encode_layer
    from turboquant.mlx_lm.patch import enabled
    from turboquant.quant.cache_codec import CacheCodec
    from turboquant.quant.codec import Codec, Encoded
    from turboquant.quant.layer import EncodedLayer

_MODULE_OF = {
    "CacheCodec": "quant.cache_codec",
    "Codec": "quant.codec",
    "Encoded": "quant.codec",
    "EncodedLayer": "quant.layer",
    "Fork": "caches.fork",
    "Prefix": "caches.prefix",
    "PromptCacheError": "io.prompt_cache",
    "TurboQuantKVCache": "caches.streaming",
    "compress": "io.prompt_cache",
    "encode_layer": "kernels.encoding",
    "enabled": "mlx_lm.patch",
    "load_prompt_cache": "io.prompt_cache",
    "make_prompt_cache": "io.prompt_cache",
    "prefill": "caches.prefix",
    "save_prompt_cache": "io.prompt_cache",
}

__all__ = [
    "CacheCodec",
    "Codec",
    "Encoded",
    "EncodedLayer",
    "Fork",
    "Prefix",
    "PromptCacheError",
    "TurboQuantKVCache",
    "compress",
    "enabled",
    "encode_layer",
    "load_prompt_cache",
    "make_prompt_cache",
    "prefill",
    "save_prompt_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'turboquant' has no attribute '{name}'")
    return getattr(importlib.import_module(f"turboquant.{_MODULE_OF[name]}"), name)
