"""Every architecture of the installed mlx-lm, built in memory with random weights and small sizes.

A config is made from the fields of the model file's ``ModelArgs``: each field that ``SIZES`` names gets that value, the
others keep their defaults. ``OWN`` has what a family needs besides.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

VOCABULARY = 96
LAYERS = 2
WINDOW = 16
# Sizes by the names that configs use. Two layers, one of each kind where a family has two.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "num_vocab", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "hidden_dim", "d_model", "n_embd", "model_dim", "block_dim"), 128),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "ff_intermediate_size"), 64),
    **dict.fromkeys(("n_inner", "shared_intermediate_size", "dense_intermediate_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "share_expert_dim", "moe_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_transformer_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_groups",), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim", "kv_channels"), 32),
    **dict.fromkeys(("global_head_dim", "hidden_size_per_head", "qk_nope_head_dim"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), WINDOW),
    **dict.fromkeys(("attention_chunk_size", "loop_window_size"), WINDOW),
    **dict.fromkeys(("sliding_window_pattern", "full_attention_interval", "layer_group_size"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "block_size", "model_max_length"), 1024),
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"), 1e-5),
    **dict.fromkeys(("post_norm_eps", "norm_epsilon"), 1e-5),
    **dict.fromkeys(("rope_theta", "swa_rope_theta", "rotary_emb_base", "rope_local_base_freq"), 10000.0),
    **dict.fromkeys(("logits_scaling", "attention_multiplier", "embedding_multiplier", "residual_multiplier"), 1.0),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads", "mamba_n_heads", "mamba_num_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv", "linear_conv_kernel_dim", "conv1d_width", "conv_L_cache"), 4),
    **dict.fromkeys(("n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"), 16),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "mamba_proj_bias", "conv_bias"), False),
    **dict.fromkeys(("norm_topk_prob", "qk_norm", "use_qk_norm", "post_norm", "use_conv_bias"), True),
    **dict.fromkeys(("mla_scale_q_lora", "mla_scale_kv_lora"), True),
    "layer_types": ["sliding_attention", "full_attention"],
    "rotary_pct": 0.5,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "routed_scaling_factor": 1.0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "mamba_d_ssm": 64,
    "time_step_rank": 8,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 8,
    "group_norm_size": 1,
    "dim_model_base": 32,
    "scale_depth": 1.4,
    "scale_emb": 2.0,
    "zero_expert_num": 1,
    "hidden_act": "relu2",
    "final_logit_softcapping": 30.0,
}
_YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_TWO_ROPES = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_LLAMA4_ROPE = {"original_max_position_embeddings": 1024, "llama_4_scaling_beta": 0.1}
_HUNYUAN = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
_LONG = {"short_factor": 1.0, "long_factor": [1.0] * 8, "original_max_position_embeddings": 1024, "type": "longrope"}
_FOUR = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_RECURRENT = {"layer_types": ["mamba", "attention"]}
# What a family needs besides SIZES.
OWN: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 1},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": _YARN, "topk_method": "greedy", "scoring_func": "softmax"},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True]},
    "gemma4_text": {**_FOUR, "num_kv_shared_layers": 2, "rope_parameters": _TWO_ROPES},
    "gemma3n": {
        **_FOUR,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5] * 4,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 1.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    },
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {"moe_layer_freq": 1, "rope_parameters": _ROPE},
    "granitemoehybrid": _RECURRENT,
    "hunyuan": {"use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2, "rope_scaling": _HUNYUAN},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
    },
    "kimi_linear": {
        "linear_attn_config": {"num_heads": 2, "head_dim": 32, "kda_layers": [1], "short_conv_kernel_size": 4}
    },
    "kimi_k3": {
        "linear_attn_config": {"num_heads": 2, "head_dim": 32, "kda_layers": [1], "short_conv_kernel_size": 4},
        "hidden_act": "situ",
    },
    "lfm2": {
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"],
    },
    "lfm2_moe": {"use_expert_bias": True, "layer_types": ["conv", "full_attention"]},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "llama4": {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "rope_scaling": None, "num_experts_per_tok": 1},
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity"},
    "mamba2": {"time_step_limit": (0.0, float("inf")), "num_heads": 4, "head_dim": 64},
    "mellum": {"rope_parameters": _TWO_ROPES},
    "minicpm3": {"rope_scaling": _LONG},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    },
    "ministral3": {"rope_parameters": {**_ROPE, **_LLAMA4_ROPE}},
    "mistral4": {"rope_parameters": {**_ROPE, **_LLAMA4_ROPE}},
    "muse_spark": {
        "rope_parameters": _ROPE,
        "layer_rope_theta": [10000.0] * 2,
        "output_multiplier": 1.0,
        "num_shared_experts": 0,
    },
    "nemotron-nas": {
        "block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}] * 2,
        "hidden_act": "silu",
    },
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"]},
    "olmo_hybrid": {"linear_allow_neg_eigval": True, "layer_types": ["linear_attention", "full_attention"]},
    "openelm": {
        "num_query_heads": [4] * 2,
        "num_kv_heads": [2] * 2,
        "ffn_multipliers": [0.5] * 2,
        "ffn_dim_divisor": 32,
    },
    "phi3small": {"vocab_size": 100352, "dense_attention_every_n_layers": 2, "gegelu_limit": 20.0},
    "plamo": {"n_shared_head": 2},
    "recurrent_gemma": {"logits_soft_cap": 30.0, "block_types": ["recurrent", "attention"]},
    "spark2_5": {"rope_parameters": _TWO_ROPES, "hidden_act": "gelu"},
}
# What cannot be built here, and why.
NOT_BUILT = {
    "bitnet": "its layers are kernels for Metal",
    "muse_spark": "its experts are kernels for Metal",
    "olmo": "it needs the package ai2-olmo",
    "prism_hadamard_qwen35": "its weights exist only quantised, in a format of its own",
}
# The language model of a wrapper whose ``text_config`` is another file's config.
TEXT = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_vl_moe": "qwen3_moe",
}


def config(family: str, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """The config of a tiny model of the family, as its config.json would hold it."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    names = {field.name for field in dataclasses.fields(module.ModelArgs)}
    if "text_config" not in names:
        return {"model_type": family, **_values(names, vocabulary), **OWN.get(family, {})}
    if family in TEXT:
        text = config(TEXT[family], vocabulary)
        text = text.get("text_config", text)
    else:
        inner = next(vars(module)[name] for name in ("TextArgs", "TextConfig", "TextModelArgs") if name in vars(module))
        names = {field.name for field in dataclasses.fields(inner)}
        text = {"model_type": family, **_values(names, vocabulary), **OWN.get(family, {})}
    return {"model_type": family, "vocab_size": vocabulary, "text_config": text}


def _values(names: set[str], vocabulary: int) -> dict[str, Any]:
    return {name: vocabulary if SIZES[name] == VOCABULARY else SIZES[name] for name in names & SIZES.keys()}


def build(family: str, vocabulary: int = VOCABULARY) -> Any:
    """A model with random float32 weights."""
    mx.random.seed(1)
    module = importlib.import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict(config(family, vocabulary)))
    model.eval()
    mx.eval(model.parameters())
    return model


def save(folder: Path, family: str, tokenizer: Any, **changes: Any) -> Path:
    """Save a model for this tokenizer. changes: of its config.json."""
    folder.mkdir(parents=True)
    leaves: Any = tree_flatten(build(family, len(tokenizer)).parameters())
    # What a row has read must count, or all rows would have the same answer.
    weights = {name: x * 6 if name.endswith("_proj.weight") else x for name, x in leaves}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    settings = {**config(family, len(tokenizer)), "eos_token_id": tokenizer.eos_token_id, **changes}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return folder
