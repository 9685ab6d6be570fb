"""What a segment is addressed by: a digest over everything that decides its content.

The model's name is not among it: the same name with other weights must miss. Knows digests only, no tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FORMAT_VERSION = 3


@dataclass(frozen=True)
class Identity:
    """Everything besides the tokens that decides a segment's content, each part a fingerprint or a description."""

    weights: str
    tokenizer: str
    codec: str
    prefill: str

    def key(self, tokens: Sequence[int], parent: str = "") -> str:
        """The segment's content address, 64 hex digits; ``parent`` is the key of the segment before it."""
        digest = hashlib.sha256(b"turboquant segment\0")
        for field in (str(FORMAT_VERSION), self.weights, self.tokenizer, self.codec, self.prefill, parent):
            encoded = field.encode()  # preceded by its length, so that no two lists of fields look the same
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        digest.update(np.asarray(tokens, dtype="<u4").tobytes())
        return digest.hexdigest()
