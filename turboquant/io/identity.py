"""Compute the address of a segment: a digest over everything that decides its content.

The name of the model is not part of it, because the same name may stand for other weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FORMAT_VERSION = 3


@dataclass(frozen=True)
class Identity:
    """Everything that decides a segment's content, except its tokens.

    weights, tokenizer: fingerprints. codec: ``CacheCodec.identity``. prefill: a description of how it is prefilled.
    """

    weights: str
    tokenizer: str
    codec: str
    prefill: str

    def key(self, tokens: Sequence[int], parent: str = "") -> str:
        """Return the segment's address, 64 hex digits. parent: the key of the segment before it."""
        digest = hashlib.sha256(b"turboquant segment\0")
        for field in (str(FORMAT_VERSION), self.weights, self.tokenizer, self.codec, self.prefill, parent):
            encoded = field.encode()  # the length comes first, so that different fields never give the same bytes
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        digest.update(np.asarray(tokens, dtype="<u4").tobytes())
        return digest.hexdigest()
