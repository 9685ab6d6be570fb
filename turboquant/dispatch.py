"""Makes a loaded mlx-lm model call a cache's own attention, and undoes it.

mlx-lm's model files import ``scaled_dot_product_attention`` by name and call it with the cache. ``enabled(model)``
rebinds that name, in the modules the model is made of, to a function that asks the cache first: one with a method
``attend`` computes attention itself, every other goes to mlx-lm's own function. Knows nothing of what ``attend`` does.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, make_prompt_cache

NAME = "scaled_dot_product_attention"
_stock = base.scaled_dot_product_attention

# Model files of mlx-lm whose K/V go from the cache into scaled_dot_product_attention and nowhere else, so that a
# cache may keep them compressed. The tests hold the list against the installed sources.
_FILES = """
Klear apertus bailing_moe bitnet cohere cohere2 dbrx deepseek dots1 ernie4_5 ernie4_5_moe exaone exaone4
exaone_moe falcon_h1 gemma gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite
granitemoe granitemoehybrid helium hunyuan hunyuan_v1_dense internlm2 internlm3 jamba lfm2 lfm2_moe llama mimo
minicpm minimax ministral3 mixtral nanochat nemotron nemotron_h olmo2 olmo3 olmo_hybrid olmoe openelm phi3
phimoe qwen qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss starcoder2 telechat3
"""
COMPRESSIBLE = frozenset(f"mlx_lm.models.{name}" for name in _FILES.split())


@contextlib.contextmanager
def enabled(model: Module) -> Iterator[None]:
    """While the block runs, ``model`` calls a cache's own ``attend`` where the cache has one.

    May be nested; the outermost exit restores mlx-lm's function. With caches of mlx-lm's own the logits stay
    bit-identical.
    """
    rebound = [module for module in _modules(model) if vars(module).get(NAME) is _stock]
    for module in rebound:
        setattr(module, NAME, _attention)
    try:
        yield
    finally:
        for module in rebound:
            setattr(module, NAME, _stock)


def compressible_layers(model: Module) -> list[bool]:
    """For each layer's cache, whether its K/V can be kept compressed without changing what the model computes.

    Not compressed are caches that are no plain append-only ``KVCache`` (sliding windows, recurrent states) and all
    layers of a model that uses K/V outside of attention or whose code is not known not to.
    """
    known = _language_model_module(model) in COMPRESSIBLE
    return [known and type(cache) is KVCache for cache in make_prompt_cache(model)]


def _attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    attend = getattr(cache, "attend", None)
    if attend is None:
        attend = functools.partial(_stock, cache=cache)
    output: mx.array = attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    return output


def _parts(model: Module) -> list[Module]:
    parts: list[tuple[str, Module]] = model.named_modules()  # type: ignore[no-untyped-call]
    return [part for _, part in parts]


def _modules(model: Module) -> list[ModuleType]:
    names = {type(part).__module__ for part in _parts(model)}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]


def _language_model_module(model: Module) -> str:
    """The module that defines the attention of the model: wrappers such as vision models hold a language model."""
    for part in _parts(model):
        if type(part).__name__.endswith("Attention"):
            return type(part).__module__
    return type(model).__module__
