"""A configuration of any family at test size, by rules on the fields' names; families with geometry of their own add to
them. What no rule knows keeps its default.

>>> tiny_config(find_family("mixtral")).num_hidden_layers
4
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from sweep.discovery import Family

LAYERS = 4
VOCABULARY = 259  # of `fate.tools.synth.store.byte_tokenizer`

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    # width and depth
    "hidden_size": 64,
    "d_model": 64,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "intermediate_size": 96,
    "dense_intermediate_size": 96,
    "ffn_hidden_size": 96,
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 16,
    # linear attention
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    # experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 48,
    "expert_ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "shared_experts_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "decoder_sparse_step": 1,
    # towers of other modalities, which only have to exist
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "num_position_embeddings": 16,
}
# Only where the family has it switched on.
_IF_SET: dict[str, Any] = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_dense_layers": 1}

_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_ENCODER_DECODER = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}
_DENSE_FIRST = ["dense", *["sparse"] * (LAYERS - 1)]
_LINEAR_FIRST = ["linear_attention", "full_attention"] * (LAYERS // 2)
# What the rules cannot know, by model type.
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "beam": {"mlp_layer_types": _DENSE_FIRST},
    "dbrx": {
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": _DENSE_FIRST, "num_key_value_heads": 4}},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {"n_shared_experts": 1},
    "diffusion_gemma": {
        "text_config": {"global_head_dim": 32},
        "vision_config": {"model_type": "gemma4_vision", **_TOWER, "position_embedding_size": 64},
        "canvas_length": 16,
    },
    "dots3_note_text": {"layer_types": ["indexed_attention"] * LAYERS},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [48, 32],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        }
    },
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "mlp_layer_types": _DENSE_FIRST}},
    "llama4": {"vision_config": _TOWER},
    "llama4_text": {
        "intermediate_size": 48,
        "intermediate_size_mlp": 96,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 16,
        "pad_token_id": 0,
    },
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4, "zero_expert_num": 4, "moe_topk": 3, "head_dim": 8},
    "mistral_large4": {"vision_config": {"model_type": "pixtral", **_TOWER}},
    "muse_spark": {
        "text_config": {"moe_hidden_size": 32},
        "audio_config": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        "projector_hidden_size": 64,
    },
    "flint": {"mlp_layer_types": _DENSE_FIRST},
    "gemma4": {
        "text_config": {"pad_token_id": 0},
        "vision_config": {**_TOWER, "position_embedding_size": 64},
        "audio_config": {"output_proj_dims": 64, "num_hidden_layers": 1},
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 2, 4],
                "partial_rotary_factor": 1.0,
            }
        }
    },
    "granitemoehybrid": {"layer_types": _LINEAR_FIRST, "mamba_n_heads": 8, "mamba_d_state": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 16, "num_key_value_heads": 2, "intermediate_size": 48},
    "kimi_linear": {"layer_types": _LINEAR_FIRST},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "nemotron_h": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
    },
    "nllb-moe": {
        **_ENCODER_DECODER,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_hidden_layers": 2,
    },
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 250,
        "audio_config": {"encoder_attention_heads": 4, "d_model": 64, "encoder_ffn_dim": 64, "encoder_layers": 1},
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
    },
    "step3p7": {
        "text_config": {"pad_token_id": 0, "mlp_layer_types": _DENSE_FIRST, "swiglu_limits": [0.0, 0.0, 0.5, 0.5]},
        "vision_config": _TOWER,
    },
    "switch_transformers": {
        "d_kv": 16,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 4,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: Family, **overrides: Any) -> PreTrainedConfig:
    """The family's configuration with four layers, eight experts (two a token) and a width of 64, in float32."""
    config = family.config(**_settings(family.config, {**OWN.get(family.model_type, {}), **overrides}))
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = "float32"
    return config


def _settings(cls: type[PreTrainedConfig], own: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        default = None if field.default is dataclasses.MISSING else field.default
        if field.name in _SIZES:
            settings[field.name] = _SIZES[field.name]
        elif field.name in _IF_SET and default and default > 1:
            settings[field.name] = _IF_SET[field.name]
    if "kv_lora_rank" in settings:  # latent attention has no groups
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for name, part in cls.sub_configs.items():
        if isinstance(part, type) and issubclass(part, PreTrainedConfig) and part is not PreTrainedConfig:
            settings[name] = _settings(part, {**OWN.get(part.model_type, {}), **own.get(name, {})})
    return {
        **settings,
        **{name: value for name, value in own.items() if name not in settings or name not in cls.sub_configs},
    }
