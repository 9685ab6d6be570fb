"""Prefill: the tokens of a context through the model, in chunks that suit the device.

Knows a model and tokens; neither where the prefix goes nor what is asked of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from turboquant import CacheCodec, Prefix
from turboquant.caches.prefix import Segment, prefill_segment
from turboquant.mlx_lm.families import explain
from turboquant.runtime.device import on_cpu

# Tokens a step. A GPU is busy with a few thousand; on a CPU a step takes seconds, and Ctrl-C waits for its end.
CPU_CHUNK, GPU_CHUNK = 512, 2048

_log = logging.getLogger(__name__)


def prefill(
    model: Any,
    tokens: Sequence[int],
    codec: CacheCodec,
    parent: Prefix | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Segment:
    """Build the segment of tokens behind a parent.

    ``on_progress`` is called with the tokens of each chunk done; what it raises ends the prefill.
    """
    return prefill_segment(model, tokens, codec, parent, CPU_CHUNK if on_cpu() else GPU_CHUNK, on_progress)


def warn_of_uncompressed_layers(model: Any) -> None:
    """Log which of a model's layers are kept as they are, and why, if any."""
    message = explain(model).message
    if message:
        _log.warning("%s", message)
