"""Tell which layers of a model of mlx-lm's can keep their keys and values compressed, and why the others cannot.

The lists of model files are kept by hand. Tests compare them with the installed sources of mlx-lm, and
docs/models.md is generated from both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from mlx.nn.layers.base import Module

from turboquant.mlx_lm.internals import MODELS, KVCache, make_prompt_cache

# In these files K/V go from the cache into scaled_dot_product_attention and nowhere else, so that a cache may keep them
# compressed.
_COMPRESSIBLE = """
Klear afmoe apertus bailing_moe bailing_moe_linear bitnet cohere cohere2 dbrx deepseek deepseek_v2 dots1 ernie4_5
ernie4_5_moe exaone exaone4 exaone_moe falcon_h1 gemma gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss
gptj granite granitemoe granitemoehybrid helium hunyuan hunyuan_v1_dense internlm2 internlm3 jamba laguna lfm2
lfm2_moe lille-130m llama llama4 llama4_text mellum mimo mimo_v2_flash minicpm minicpm3 minimax ministral3 mixtral
muse_glimmer nanbeige nanochat nemotron nemotron-nas nemotron_h olmo2 olmo3 olmo_hybrid olmoe openelm phi phi3 phimoe
phixtral plamo3 qwen qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss spark2_5 stablelm starcoder2 step3p5 talkie
telechat3 youtu_llm
"""
COMPRESSIBLE = frozenset(f"{MODELS}.{file}" for file in _COMPRESSIBLE.split())

_LATENT = "keeps a latent vector (MLA) instead of keys and values"
_LATENT_FILES = """
bailing_hybrid bailing_moe_v3 deepseek_v3 deepseek_v32 glm4_moe_lite kimi_k3 kimi_linear longcat_flash mistral4
"""
_SHARED = "passes keys and values on to other layers"
# What other files do with K/V: each text completes a sentence that starts with the name of the file.
USES = {
    **dict.fromkeys(_LATENT_FILES.split(), _LATENT),
    "afm7": _SHARED,
    "gear": "computes soft-capped attention itself",
    "gemma2": "computes soft-capped attention itself",
    "gemma3n": _SHARED,
    "gemma4_text": _SHARED,
    "iquestloopcoder": _SHARED,
    "minimax_m3_vl": "selects blocks of keys before attention",
    "olmo": "computes attention itself",
    "phi3small": "computes block-sparse attention itself",
    "plamo": "repeats keys and values before attention",
    "plamo2": "computes attention itself",
}
_NOT_VERIFIED = "is not verified to use its keys and values in attention alone"

# mlx-lm's caches that are not a plain, append-only KVCache, and which layers use them.
KINDS = {
    "ArraysCache": "recurrent state",
    "ChunkedKVCache": "chunked attention",
    "RotatingKVCache": "sliding-window attention",
}


Batching = Literal["together", "equal lengths", "one by one"]
# Files of mlx-lm whose rows do not answer in a batch as alone. Some compute with the padding of shorter rows, so that
# only rows of equal length can share a batch; others fail in any batch, or mix up rows and heads.
BATCHING: dict[str, Batching] = {
    **dict.fromkeys(("afm7", "bailing_moe_linear", "jamba", "longcat_flash_ngram", "mamba"), "equal lengths"),
    **dict.fromkeys(("nemotron_h", "olmo_hybrid"), "equal lengths"),
    **dict.fromkeys(("deepseek_v41", "gemma2", "gpt_bigcode", "llama4", "phi3small"), "one by one"),
}
# What users are told, from the best to the worst.
BATCHING_MESSAGES: dict[Batching, str] = {
    "together": "",
    "equal lengths": (
        "only rows of equal length on one document share a batch: "
        "mlx-lm's batches of other rows change this model's answers"
    ),
    "one by one": "rows are decoded one by one: mlx-lm's batches change this model's answers, or fail",
}


@dataclass(frozen=True)
class Support:
    """Which layers of a model can be kept compressed, and why the others cannot.

    layers: for each layer's cache, whether its K/V can be compressed without changing what the model computes.
    reasons: one for each kind of layer that cannot, with the number of these layers.
    """

    layers: tuple[bool, ...]
    reasons: tuple[str, ...]

    @property
    def status(self) -> Literal["compressed", "partial", "none"]:
        """Whether all layers can be compressed (``compressed``), some (``partial``) or none."""
        if all(self.layers):
            return "compressed"
        return "partial" if any(self.layers) else "none"

    @property
    def message(self) -> str:
        """A sentence that says how many layers are kept uncompressed and why; empty if there are none.

        >>> Support((True, False), ("sliding-window attention (1 RotatingKVCache)",)).message
        '1 of 2 layers are kept uncompressed: sliding-window attention (1 RotatingKVCache)'
        """
        total = len(self.layers)
        kept = f"{total - sum(self.layers)} of {total}" if any(self.layers) else f"all {total}"
        return f"{kept} layers are kept uncompressed: {', '.join(self.reasons)}" if self.reasons else ""


def explain(model: Module) -> Support:
    """Return which layers of a model loaded by mlx-lm can be kept compressed, and why the others cannot.

    A layer is compressed if its cache is a plain append-only ``KVCache`` (not a sliding window or a recurrent state),
    and if the model's code is known to use keys and values in attention only.
    """
    module = _attention_module(model)
    caches = make_prompt_cache(model)
    # Some wrappers of mlx-lm's give the sliding-window layers of their language model plain caches, with a mask.
    slides = [bool(getattr(layer, "use_sliding", False)) for layer in model.layers]
    slides = slides if len(slides) == len(caches) else [False] * len(caches)
    layers = tuple(
        module in COMPRESSIBLE and type(cache) is KVCache and not sliding
        for cache, sliding in zip(caches, slides, strict=True)
    )
    file = module.removeprefix(f"{MODELS}.")
    kept = Counter(
        (KINDS["RotatingKVCache"] if sliding else reason(file, type(cache).__name__), type(cache).__name__)
        for cache, yes, sliding in zip(caches, layers, slides, strict=True)
        if not yes
    )
    return Support(layers, tuple(f"{why} ({count} {kind})" for (why, kind), count in kept.items()))


def known_batching(model: Module) -> Batching:
    """Return which rows of a model loaded by mlx-lm may share a batch, as far as is known of its architecture."""
    parts: list[Module] = model.modules()  # type: ignore[no-untyped-call]
    files = {type(part).__module__.removeprefix(f"{MODELS}.") for part in parts}
    return max((BATCHING.get(file, "together") for file in files), key=list(BATCHING_MESSAGES).index)


def reason(file: str, kind: str) -> str:
    """Return why a cache of class ``kind``, made by a model that ``file`` defines, is not compressed."""
    if kind in KINDS:
        return KINDS[kind]
    if kind == "KVCache" or file in USES:
        return f"{file} {USES.get(file, _NOT_VERIFIED)}"
    return "several caches in one layer" if kind == "CacheList" else "a cache of the model's own"


def _attention_module(model: Module) -> str:
    """Return the name of the module that defines the model's attention.

    A wrapper, for example a vision model, holds a language model of another module. Where several modules define
    attention, one that is not known to be compressible decides for all.
    """
    parts: list[Module] = model.modules()  # type: ignore[no-untyped-call]
    modules = [type(part).__module__ for part in parts if type(part).__name__.endswith("Attention")]
    modules = modules or [type(model).__module__]
    return next((module for module in modules if module not in COMPRESSIBLE), modules[0])
