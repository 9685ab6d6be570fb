"""Model families: compressed layers stay close to full precision, and other layers are reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3, llama
from mlx_lm.models.cache import KVCache, make_prompt_cache

from turboquant import CacheCodec, EncodedLayer, Prefix, TurboQuantKVCache, enabled, prefill
from turboquant.caches.prefix import Segment, join
from turboquant.io.identity import Identity
from turboquant.io.segment_file import read_segment, write_segment
from turboquant.mlx_lm.families import Support, explain

Build = Callable[[str], Any]
Tokens = Callable[[int, int], list[int]]
FAMILIES = [
    "llama",
    "qwen2",  # a key bias 20 times the rest
    "qwen3",
    "gemma3_text",  # sliding windows
    "gpt_oss",  # learned attention sinks
    "qwen3_next",  # recurrent layers
    "phi",  # head_dim 80
    "phi3",  # head_dim 96
    "deepseek_v2",  # keys and values of different sizes
]
CONTEXT = 400


def logits(model: Any, caches: list[Any], tokens: list[int] | mx.array) -> mx.array:
    """Return logits (L, vocabulary), or (B, L, vocabulary) for rows of tokens."""
    with enabled(model):
        rows = tokens if isinstance(tokens, mx.array) else mx.array(tokens)[None]
        out: mx.array = model(rows, cache=caches)
        mx.eval(out)
    return out if isinstance(tokens, mx.array) else out[0]


def divergence(expected: mx.array, got: mx.array) -> float:
    """Return the mean KL divergence, in nats, between the next-token distributions of two arrays of logits."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (expected, got))
    return float((mx.exp(p) * (p - q)).sum(axis=-1).mean())


def prefixed(model: Any, tokens: list[int], codec: CacheCodec) -> list[Any]:
    return prefill(model, tokens, codec, chunk=150).fork()


def streamed(model: Any, tokens: list[int], codec: CacheCodec) -> list[Any]:
    """Return caches that are filled in chunks; the compressible ones compress their own past."""
    layers = zip(explain(model).layers, make_prompt_cache(model), strict=True)
    caches = [TurboQuantKVCache(codec) if yes else cache for yes, cache in layers]
    for start in range(0, len(tokens), 100):
        logits(model, caches, tokens[start : start + 100])
    assert all(c.layer is not None for c in caches if isinstance(c, TurboQuantKVCache))
    return caches


@pytest.mark.parametrize("compress", [prefixed, streamed])
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_are_close_to_full_precision_and_two_are_not(
    family: str, compress: Callable[..., list[Any]], build_model: Build, fill: Any, random_tokens: Tokens
) -> None:
    """A wrong mask, a wrong position or a missing sink costs hundreds of times as much as eight bits."""
    model, context, query = build_model(family), random_tokens(CONTEXT, 0), random_tokens(40, 1)
    expected = logits(model, fill(model, context), query)
    eight, two = (
        divergence(expected, logits(model, compress(model, context, CacheCodec(bits, bits)), query)) for bits in (8, 2)
    )
    assert eight < 0.002
    assert eight < two / 200


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3"])
def test_a_restored_prefix_gives_the_same_logits_and_a_batch_nearly(
    family: str, build_model: Build, random_tokens: Tokens, tmp_path: Path
) -> None:
    """A restored prefix gives the same bits; in a batch, products of other shapes round differently."""
    model, codec, query = build_model(family), CacheCodec(4, 3), random_tokens(7, 1)
    prefix = prefill(model, random_tokens(CONTEXT, 0), codec)
    expected = logits(model, prefix.fork(), query)

    segment = Segment(prefix.layers, 0, prefix.tokens)
    write_segment(tmp_path, "key", segment, Identity("w", "t", codec.identity, "exact"))
    restored = join([read_segment(tmp_path, "key", codec)])
    assert mx.array_equal(logits(model, restored.fork(), query), expected)

    forks = [prefix.fork(), restored.fork(), prefix.fork()]
    other = random_tokens(7, 2)
    batch = [type(rows[0]).merge(list(rows)) for rows in zip(*forks, strict=True)]
    got = logits(model, batch, mx.array([query, other, query]))
    assert divergence(expected, got[0]) < 1e-5
    assert divergence(expected, got[2]) < 1e-5
    assert divergence(logits(model, prefix.fork(), other), got[1]) < 1e-5


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "qwen3_next", "deepseek_v3"])
def test_layers_that_are_not_compressed_are_mlx_lm_s_own_bit_by_bit(
    family: str, build_model: Build, fill: Any, build_prefix: Any, random_tokens: Tokens
) -> None:
    model, tokens = build_model(family), random_tokens(CONTEXT, 0)
    prefix = build_prefix(model, tokens, CacheCodec())
    for yes, layer, stock in zip(explain(model).layers, prefix.layers, fill(model, tokens), strict=True):
        assert type(layer) is (EncodedLayer if yes else type(stock))
        if not yes:
            pairs = zip(arrays(layer), arrays(stock), strict=True)
            assert all(mx.array_equal(a, b) for a, b in pairs)


def arrays(cache: Any) -> list[mx.array]:
    state: Any = cache.keys_and_values() if type(cache) is KVCache else cache.state
    return [leaf for _, leaf in tree_flatten(state) if isinstance(leaf, mx.array)]


def test_a_model_that_cannot_be_compressed_answers_as_it_does_by_itself(
    build_model: Build, random_tokens: Tokens
) -> None:
    model, tokens, query = build_model("deepseek_v3"), random_tokens(90, 0), random_tokens(5, 1)
    stock = make_prompt_cache(model)
    for start in (0, 40, 80):
        logits(model, stock, tokens[start : start + 40])
    prefix = prefill(model, tokens, CacheCodec(2, 2), chunk=40)
    assert prefix.effective_bits == 0
    first = logits(model, prefix.fork(), query)
    # Up to rounding, since on a CPU NumPy computes SwiGLU in our prefill.
    assert mx.allclose(first, logits(model, stock, query), rtol=1e-4, atol=1e-4)
    assert mx.array_equal(first, logits(model, prefix.fork(), query))


# --- a key bias that dominates


def test_a_dominant_key_bias_needs_the_mean_removed(build_model: Build, fill: Any, random_tokens: Tokens) -> None:
    """Keys of which a constant is 20 times the rest, as a bias makes them in Qwen2.5.

    The bias is in channels that RoPE hardly turns over the context, so it moves all scores of a query alike and the
    model does not see it. The codec does: 3 bits of the whole vector err by several times the part that tells tokens
    apart. Queries and output are scaled down to where 3 bits without any bias would do.
    """
    model, context, query = scaled_down(build_model("qwen2")), random_tokens(CONTEXT, 0), random_tokens(40, 1)
    stock = fill(model, context)
    for cache in stock:
        keys = cache.keys_and_values()[0][0]
        mean = keys.mean(axis=1)
        rest = mx.sqrt(mx.square(keys - mean[:, None]).sum(axis=-1).mean(axis=-1))
        assert mx.allclose(mx.linalg.norm(mean, axis=-1) / rest, mx.array(20.0), rtol=0.15)
    without = without_means(prefill(model, context, CacheCodec(3, 3)), stock)
    expected = logits(model, stock, query)
    assert divergence(expected, logits(model, prefixed(model, context, CacheCodec(3, 3)), query)) < 0.02
    assert divergence(expected, logits(model, streamed(model, context, CacheCodec(3, 3)), query)) < 0.02
    assert divergence(expected, logits(model, without.fork(), query)) > 0.2


def scaled_down(model: Any) -> Any:
    scaled = type(model)(model.args)
    scaled.update(model.parameters())
    for layer in scaled.layers:
        layer.self_attn.q_proj.weight *= 0.4
        layer.self_attn.q_proj.bias *= 0.4
    scaled.lm_head.weight *= 0.5
    return scaled


def without_means(prefix: Prefix, stock: list[Any]) -> Prefix:
    """Return the same prefix with keys that are encoded without removing the mean; ``stock`` holds the keys."""
    layers = []
    for layer, cache in zip(prefix.layers, stock, strict=True):
        start = layer.sink_keys.shape[1]
        keys = cache.keys_and_values()[0][0, :, start : start + layer.keys.tokens]
        zero = mx.zeros_like(layer.key_mean)
        layers.append(dataclasses.replace(layer, keys=layer.key_codec.encode(keys, zero), key_mean=zero))
    return Prefix(tuple(layers), prefix.tokens)


# --- what a user is told


@pytest.mark.parametrize(
    ("family", "status", "message"),
    [
        ("llama", "compressed", ""),
        (
            "gemma3_text",
            "partial",
            "2 of 4 layers are kept uncompressed: sliding-window attention (2 RotatingKVCache)",
        ),
        ("qwen3_next", "partial", "1 of 2 layers are kept uncompressed: recurrent state (1 ArraysCache)"),
        (
            "deepseek_v3",
            "none",
            "all 2 layers are kept uncompressed: "
            "deepseek_v3 keeps a latent vector (MLA) instead of keys and values (2 KVCache)",
        ),
        (
            "gemma2",
            "none",
            "all 2 layers are kept uncompressed: gemma2 computes soft-capped attention itself (2 KVCache)",
        ),
    ],
)
def test_the_message_names_the_layers_that_are_kept_and_the_reason(
    family: str, status: str, message: str, build_model: Build
) -> None:
    support = explain(build_model(family))
    assert support.status == status
    assert support.message == message


def test_each_kind_of_layer_has_its_reason() -> None:
    reasons = ("sliding-window attention (2 RotatingKVCache)", "recurrent state (1 ArraysCache)")
    assert Support((False, True, False, False), reasons).message == (
        "3 of 4 layers are kept uncompressed: sliding-window attention (2 RotatingKVCache), "
        "recurrent state (1 ArraysCache)"
    )


def test_a_wrapper_is_supported_like_its_language_model(build_model: Build) -> None:
    text = {**dataclasses.asdict(build_model("gemma3_text").args), "model_type": "gemma3_text"}
    wrapper = gemma3.Model(gemma3.ModelArgs("gemma3", text_config=text, vocab_size=text["vocab_size"]))
    assert explain(wrapper) == explain(build_model("gemma3_text"))


class HomemadeAttention(nn.Module):
    pass


def test_code_of_others_is_not_trusted(build_model: Build) -> None:
    """Code of others is not trusted inside of a known model either."""
    model = llama.Model(build_model("llama").args)
    model.layers[1].self_attn = HomemadeAttention()
    support = explain(model)
    assert support.layers == (False, False)
    assert f"{__name__} is not verified to use its keys and values in attention alone (2 KVCache)" in support.message
