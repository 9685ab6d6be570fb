"""Prefill: the tokens of a context through the model, chunk by chunk, into a compressed prefix.

``exact``: every chunk attends to its past in full precision, and the finished context is encoded once. Knows a model
and tokens; neither where the prefix goes nor what is asked of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from pipeline.identity import PREFILL_CHUNK
from turboquant import CacheCodec, Prefix, enabled
from turboquant.cache import PrefillCache
from turboquant.dispatch import compressible_layers

_log = logging.getLogger(__name__)


def prefill(
    model: Any, tokens: Sequence[int], codec: CacheCodec, on_progress: Callable[[int], None] = lambda _: None
) -> Prefix:
    """Build the prefix of a context. ``on_progress`` is called with the tokens of each chunk done; what it raises
    ends the prefill.
    """
    compressible = compressible_layers(model)
    caches = make_prompt_cache(model)
    caches = [PrefillCache(len(tokens)) if yes else c for yes, c in zip(compressible, caches, strict=True)]
    with enabled(model):
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            model(mx.array(list(chunk))[None], cache=caches)
            mx.eval([cache.state for cache in caches])  # the logits are never needed, so never computed
            mx.clear_cache()
            on_progress(len(chunk))
    return Prefix.encode(caches, len(tokens), codec, compressible)


def warn_of_uncompressed_layers(model: Any) -> None:
    """Log which part of a model's layers is kept as it is, if any."""
    compressible = compressible_layers(model)
    if not all(compressible):
        _log.warning(
            "%d of the model's %d layers are kept uncompressed: sliding-window, recurrent or latent attention, or "
            "an architecture not known to use its K/V in attention alone",
            len(compressible) - sum(compressible),
            len(compressible),
        )
