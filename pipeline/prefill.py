"""Prefill: the tokens of a context through the model, in the chunks that are part of a segment's identity.

Knows a model and tokens; neither where the prefix goes nor what is asked of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import turboquant
from pipeline.identity import PREFILL_CHUNK
from turboquant import CacheCodec, Prefix
from turboquant.dispatch import compressible_layers

_log = logging.getLogger(__name__)


def prefill(
    model: Any, tokens: Sequence[int], codec: CacheCodec, on_progress: Callable[[int], None] = lambda _: None
) -> Prefix:
    """Build the prefix of a context. ``on_progress`` is called with the tokens of each chunk done; what it raises
    ends the prefill.
    """
    return turboquant.prefill(model, tokens, codec, PREFILL_CHUNK, on_progress)


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
