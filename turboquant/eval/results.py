"""The inputs and the results of a measurement of fidelity, which divergence.py makes.

Sample         a context and the token runs that continue it
Baseline       a way to fill a cache with a context: turboquant's, mlx-lm's or another package's
Fidelity       the figures of one baseline over all samples
FidelityError  and its subclasses: figures that must not be believed
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from turboquant.caches.prefix import Prefix
from turboquant.eval.teacher_forcing import Context
from turboquant.quant.cache_codec import CacheCodec


class FidelityError(Exception):
    """A figure cannot be measured, or must not be believed; the message says which figure and why."""


class CannotRun(FidelityError):
    """A baseline's cache cannot run this model here."""


class NoDrift(FidelityError):
    """A compressed cache changed nothing at all: it was bypassed, or nothing in it is compressed."""


class NotFinite(FidelityError):
    """The logits or their divergence are infinite or NaN."""


class WarmDiffers(FidelityError):
    """A prefix that was saved and loaded gives other logits than the same prefix before it was saved."""


class BatchDiffers(FidelityError):
    """A row gives other logits in a batch than alone, and rounding does not explain the difference."""


@dataclass(frozen=True)
class Sample:
    """A context and its continuations, as tokens. Each continuation is fed directly behind the context."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Filled:
    """A baseline's cache that holds a context.

    cache: a ``Prefix``, which is forked for each continuation, or an mlx-lm prompt cache, which is copied for each.
    nbytes: the bytes of the compressible layers, with everything counted. A number in full precision counts as two
        bytes, also where a CPU runs the model in float32.
    """

    cache: Prefix | list[Any]
    nbytes: int

    def fork(self) -> list[Any]:
        """Return a prompt cache for one continuation."""
        return self.cache.fork() if isinstance(self.cache, Prefix) else copy.deepcopy(self.cache)


@dataclass(frozen=True)
class Baseline:
    """A way to fill a cache with a context.

    key_bits, value_bits: the bits that it claims; with 16 or more it need not change any prediction.
    prefill: ``exact`` where it starts from the full-precision context, ``streaming`` where it compresses while it
        reads, ``segments of N`` where each N tokens are read behind the compressed ones before them.
    codec: the codec to save and load its prefix with; None for other kinds of cache.
    """

    name: str
    key_bits: float
    value_bits: float
    prefill: str
    fill: Callable[[Context], Filled]
    codec: CacheCodec | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.key_bits:g}/{self.value_bits:g} {self.prefill}"


@dataclass(frozen=True)
class Fidelity:
    """How much a baseline's cache changes the model's predictions, over all positions of all continuations.

    effective_bits: bits for one coordinate of the compressed layers, with everything counted.
    compression: 16 divided by ``effective_bits``.
    bytes_per_token: bytes of the compressed layers.
    kl: mean Kullback-Leibler divergence from the prediction in full precision, in nats.
    kl_stderr: standard error of ``kl``, clustered by sample, or by continuation if there is one sample; None if there
        is one continuation.
    top1: share of positions where the most likely token is the same as in full precision.
    answers: share of continuations where it is the same at every position: of greedy answers, those that do not change.
    cosine: cosine between the two vectors of logits, mean over positions.
    perplexity, perplexity_full: perplexity of the continuations' tokens, here and in full precision.
    batch_difference: the largest difference of a logit between a row alone and in a batch; None if not measured.
    """

    cache: str
    prefill: str
    key_bits: float
    value_bits: float
    effective_bits: float
    compression: float
    bytes_per_token: float
    kl: float
    kl_stderr: float | None
    kl_p99: float
    kl_worst: float
    top1: float
    answers: float
    cosine: float
    perplexity: float
    perplexity_full: float
    positions: int
    batch_difference: float | None

    @property
    def perplexity_change(self) -> float:
        """The growth of perplexity, as a share of the perplexity in full precision."""
        return self.perplexity / self.perplexity_full - 1
