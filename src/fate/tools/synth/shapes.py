"""The shapes of full-size models, by name: what their published configurations say that transformers' classes do not.

Where a class's defaults are the published model's, only what names the size is repeated.

`deepseek-moe-16b` is expressed as Glm4Moe, the transformers class with DeepSeekMoE-16B's parts (multi-head attention,
a dense first layer, ungated shared experts, unnormalised top-k weights): all matrix shapes are the original's, but
the router's scores are sigmoids where DeepSeekMoE-16B has a softmax, and queries, keys and values have biases.
"""

from __future__ import annotations

from typing import Any

from fate.errors import UsageError

COMMON = {"dtype": "bfloat16", "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}

MODELS: dict[str, dict[str, Any]] = {
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "intermediate_size": 5632,
        "vocab_size": 151936,
        "norm_topk_prob": False,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "deepseek-moe-16b": {
        "model_type": "glm4_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "partial_rotary_factor": 1.0,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "intermediate_size": 10944,
        "vocab_size": 102400,
        "norm_topk_prob": False,
        "num_mtp_layers": 0,
        "attention_bias": True,
        "max_position_embeddings": 4096,
    },
    "qwen3-30b-a3b": {  # Qwen/Qwen3-30B-A3B
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "vocab_size": 151936,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3.5-35b-a3b": {  # Qwen/Qwen3.5-35B-A3B, its text model
        "model_type": "qwen3_5_moe_text",
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "max_position_embeddings": 262144,
    },
    "qwen3-next-80b-a3b": {  # Qwen/Qwen3-Next-80B-A3B-Instruct
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "max_position_embeddings": 262144,
    },
    "gpt-oss-20b": {  # openai/gpt-oss-20b; the class's defaults are gpt-oss-120b's
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "intermediate_size": 2880,
    },
    "glm-4.7-flash": {  # zai-org/GLM-4.7-Flash
        "model_type": "glm4_moe_lite",
        "hidden_size": 2048,
        "num_hidden_layers": 47,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
    },
    "deepseek-v2-lite": {  # deepseek-ai/DeepSeek-V2-Lite
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1408,
        "intermediate_size": 10944,
        "vocab_size": 102400,
        "norm_topk_prob": False,
        "topk_method": "greedy",
        "max_position_embeddings": 163840,
    },
    "gemma-4-26b-a4b": {  # google/gemma-4-26B-A4B, its text model
        "model_type": "gemma4_text",
        "enable_moe_block": True,
        "hidden_size": 2816,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "head_dim": 256,
        "global_head_dim": 512,
        "attention_k_eq_v": True,
        "intermediate_size": 2112,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 1024,
        "vocab_size": 262144,
        "max_position_embeddings": 262144,
    },
}
UNIFORM_ONLY = frozenset(MODELS) - {"qwen1.5-moe-a2.7b", "deepseek-moe-16b"}  # `real` was measured for these two


def default_routing(name: str, routing: str | None) -> str:
    """The routing that a store of these shapes gets. Raises UsageError where it has none of this name."""
    if routing == "real" and name in UNIFORM_ONLY:
        raise UsageError(f"{name} has no routing like trained models' yet: choose --routing uniform")
    return routing or ("uniform" if name in UNIFORM_ONLY else "real")
