"""Tiny models of several families with random weights, and attention computed the plain way to compare with."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from turboquant import CacheCodec, EncodedLayer, Prefix
from turboquant.kernels.encoding import encode_layer
from turboquant.mlx_lm.families import explain

VOCABULARY = 96
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": {  # head_dim is hidden_size over num_attention_heads
        **{name: value for name, value in SMALL.items() if name != "head_dim"},
        "hidden_size": 256,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
    "qwen3": {**SMALL, "max_position_embeddings": 4096, "tie_word_embeddings": False, "rope_theta": 1e4},
    "gemma2": SMALL,
    "gemma3_text": {**SMALL, "num_hidden_layers": 4, "sliding_window": 32, "sliding_window_pattern": 2},
    "gpt_oss": {
        **{name: value for name, value in SMALL.items() if name != "rms_norm_eps"},
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_next": {
        **SMALL,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 0,
        "mlp_only_layers": [],
        "moe_intermediate_size": 0,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 4096,
        "full_attention_interval": 2,
    },
    "phi": {  # head_dim 80
        "hidden_size": 160,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    },
    "phi3": {  # head_dim 96
        **{name: value for name, value in SMALL.items() if name != "head_dim"},
        "hidden_size": 192,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "deepseek_v2": {  # keys of 48 coordinates, values of 32
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "qk_nope_head_dim": 32,
        "vocab_size": VOCABULARY,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
    },
    "deepseek_v3": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": None,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "qk_nope_head_dim": 32,
        "vocab_size": VOCABULARY,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
    },
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    mx.random.seed(0)


@pytest.fixture(scope="session")
def build_model() -> Callable[[str], Any]:
    """`build_model("llama")`: a model of mlx-lm's with random float32 weights, the same one whenever asked."""

    @functools.cache
    def build(family: str) -> Any:
        mx.random.seed(1)
        module = importlib.import_module(f"mlx_lm.models.{family}")
        model = module.Model(module.ModelArgs(model_type=family, **CONFIGS[family]))
        model.update(tree_map_with_path(_sharpened, model.parameters()))
        if family == "qwen2":
            for layer in model.layers:
                layer.self_attn.k_proj.bias = _dominant_bias(layer.self_attn)
        model.eval()
        mx.eval(model.parameters())
        return model

    return build


def _sharpened(path: str, weight: mx.array) -> mx.array:
    """Larger weights than the default, so that attention is no plain mean and no two logits are close."""
    if path.endswith("sinks"):
        return 8 + 2 * mx.random.normal(weight.shape)  # large enough to take a good share
    if any(name in path for name in ("q_proj.weight", "k_proj.weight")):
        return weight * 3
    return weight * 2 if weight.ndim > 1 else weight


def _dominant_bias(attention: Any) -> mx.array:
    """A key bias of 20 times the norm of the rest of each head's keys, as Qwen2.5's: in few channels, those that RoPE
    turns so slowly that the bias is the same for all tokens of a context.
    """
    heads, head_dim = attention.n_kv_heads, attention.k_proj.weight.shape[0] // attention.n_kv_heads
    rest = mx.linalg.norm(attention.k_proj.weight.reshape(heads, -1), axis=1)  # of keys of inputs of unit variance
    slow = mx.arange(head_dim) % (head_dim // 2) >= head_dim // 2 - 3
    bias = mx.random.normal((heads, head_dim)) * slow
    bias *= (20 * rest / mx.linalg.norm(bias, axis=1))[:, None]
    return bias.reshape(-1)


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the emulator compiles kernels, once each for all processes of the tests."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "kernels"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def fill() -> Callable[[Any, list[int]], list[Any]]:
    """`fill(model, tokens)`: mlx-lm's own caches after these tokens."""

    def fill(model: Any, tokens: list[int]) -> list[Any]:
        caches: list[Any] = make_prompt_cache(model)
        model(mx.array(tokens)[None], cache=caches)
        mx.eval([cache.state for cache in caches])
        return caches

    return fill


@pytest.fixture(scope="session")
def build_prefix(fill: Callable[..., list[Any]]) -> Callable[..., Prefix]:
    """`build_prefix(model, tokens, codec)`: the tokens' prefix, prefilled in full precision."""

    def build(model: Any, tokens: list[int], codec: CacheCodec) -> Prefix:
        return Prefix.encode(fill(model, tokens), len(tokens), codec, explain(model).layers)

    return build


@pytest.fixture(scope="session")
def random_tokens() -> Callable[[int, int], list[int]]:
    """`random_tokens(count, seed)`."""

    def tokens(count: int, seed: int) -> list[int]:
        return [int(token) for token in np.random.default_rng(seed).integers(0, VOCABULARY, count)]

    return tokens


@pytest.fixture(scope="session")
def random_layer() -> Callable[..., EncodedLayer]:
    """`random_layer(tokens, codec, heads=, key_dim=, value_dim=)`: keys with a large common offset, as Qwen2's."""

    def build(
        tokens: int, codec: CacheCodec, heads: int = 2, key_dim: int = 64, value_dim: int | None = None
    ) -> EncodedLayer:
        keys = mx.random.normal((heads, tokens, key_dim)) + 2 * mx.random.normal((heads, 1, key_dim))
        values = mx.random.normal((heads, tokens, value_dim or key_dim)) + 1
        return encode_layer(keys, values, codec)

    return build


Exact = Callable[..., tuple[NDArray[np.float64], NDArray[np.float64]]]


@pytest.fixture(scope="session")
def exact_attention() -> Exact:
    """`exact_attention(queries, keys, values, scale, visible=None)`: (output, logsumexp) in float64 NumPy.

    queries (B, n_heads, L, D), keys and values (B or 1, n_kv_heads, T, D), visible broadcastable to (B, 1, L, T).
    """

    def attend(
        queries: mx.array, keys: mx.array, values: mx.array, scale: float, visible: Any = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        q, k, v = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (queries, keys, values))
        repeats = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, repeats, axis=1), np.repeat(v, repeats, axis=1)
        scores = q @ k.swapaxes(-1, -2) * scale
        if visible is not None:
            scores = np.where(np.asarray(visible), scores, -np.inf)
        highest = scores.max(axis=-1, keepdims=True)
        highest = np.where(np.isinf(highest), 0.0, highest)
        weights = np.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        with np.errstate(divide="ignore"):
            logsumexp = (highest + np.log(total))[..., 0]
        return (weights @ v) / np.maximum(total, 1e-300), logsumexp

    return attend
