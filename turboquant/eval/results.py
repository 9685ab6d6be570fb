"""What a measurement of fidelity is made of, and what it gives.

    Sample      a context and the token runs that continue it
    Contender   a way to fill a cache with a context: this package's, mlx-lm's, anybody's
    Fidelity    a contender's figures over all samples
    FidelityError and below: figures that must not be believed

Knows no models; how figures come about is divergence.py's.
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
    """A figure that must not be believed, or cannot be had; the message says which and why."""


class CannotRun(FidelityError):
    """A contender's cache cannot run this model here."""


class NoDrift(FidelityError):
    """A compressed cache changed nothing at all: it was bypassed, or holds nothing compressed."""


class NotFinite(FidelityError):
    """The logits, or their divergence, are infinite or no numbers."""


class WarmDiffers(FidelityError):
    """A prefix that was saved and loaded gives other logits than the same one just built."""


class BatchDiffers(FidelityError):
    """A row in a batch gives other logits than alone, by more than rounding explains."""


@dataclass(frozen=True)
class Sample:
    """A context and what follows it: each continuation is fed on its own, behind the context."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Filled:
    """A contender's cache, holding a context.

    cache: a ``Prefix``, forked for each continuation, or an mlx-lm prompt cache, copied for each.
    nbytes: bytes of the compressible layers, everything counted. What is held in full precision counts two bytes a
        number, also where a CPU runs the model in float32.
    """

    cache: Prefix | list[Any]
    nbytes: int

    def fork(self) -> list[Any]:
        """A prompt cache for one continuation."""
        return self.cache.fork() if isinstance(self.cache, Prefix) else copy.deepcopy(self.cache)


@dataclass(frozen=True)
class Contender:
    """A way to fill a cache with a context.

    key_bits, value_bits: as it states them; 16 or more means that it need not move the model.
    prefill: ``exact`` where it starts from the full-precision context, ``streaming`` where it compresses as it reads.
    codec: what a prefix it makes is saved and loaded with; None for caches of other kinds.
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
    """What a contender's cache does to the model's predictions, over all positions of all continuations.

    effective_bits: bits a coordinate of the compressed layers, everything counted; compression: 16 over that.
    bytes_per_token: of the compressed layers.
    kl: mean Kullback-Leibler divergence of the prediction from full precision's, in nats; kl_stderr: its standard
        error, clustered by sample, or by continuation where there is one sample, None where there is one of each.
    top1: share of positions whose likeliest token is full precision's.
    cosine: between the two vectors of logits, mean over positions.
    perplexity: of the continuations' tokens; perplexity_full: the same in full precision.
    batch_difference: the largest difference of a logit between a row alone and in a batch; None if not tried.
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
    cosine: float
    perplexity: float
    perplexity_full: float
    positions: int
    batch_difference: float | None

    @property
    def perplexity_change(self) -> float:
        """By how much perplexity has grown, as a share of full precision's."""
        return self.perplexity / self.perplexity_full - 1
