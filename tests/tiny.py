"""Tiny random checkpoints in the layout of the hub, one per family, for every test that needs a model.

>>> tiny_checkpoint("qwen2_moe")  # safetensors shards, config.json and a byte tokenizer
>>> tiny_store("mixtral", expert_bits=32, dense_bits=16)
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fate.convert import convert
from fate.tools.synth.store import byte_tokenizer

_ATTENTION = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259}
_MLA = {
    **_ATTENTION,
    "num_key_value_heads": 4,
    "intermediate_size": 160,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        **_ATTENTION,
        "intermediate_size": 160,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
    },
    "qwen3_moe": {
        **_ATTENTION,
        "hidden_size": 128,
        "head_dim": 24,
        "intermediate_size": 160,
        "moe_intermediate_size": 80,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        **_ATTENTION,
        "intermediate_size": 112,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
    },
    "olmoe": {
        **_ATTENTION,
        "intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
    },
    "deepseek_v2": {**_MLA, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {**_MLA, "q_lora_rank": 24, "n_group": 4, "topk_group": 2},
}


_OTHERS = {  # families that only single tests want
    "gpt_oss": {**_ATTENTION, "intermediate_size": 64, "num_experts_per_tok": 2, "num_hidden_layers": 2},
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The family's configuration at test size; every layer but DeepSeek's first is MoE."""
    settings: dict[str, Any] = {
        "max_position_embeddings": 512,
        "dtype": "float32",
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    return AutoConfig.for_model(
        family, **{**settings, "pad_token_id": None, **{**FAMILIES, **_OTHERS}[family], **overrides}
    )


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A randomly initialised model whose routers prefer some experts to others."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "norm" not in name:
                tensor.normal_(0.0, 0.4 if "gate.weight" in name else 0.06)
    return model


def tiny_checkpoint(family: str, seed: int = 0, shard_size: str = "400KB", **overrides: Any) -> Path:
    """A checkpoint directory of `tiny_model` with a byte tokenizer, made once per process; copy it before changing it.

    Experts are saved apart, one tensor each, as hub repositories have them.
    """
    path = _folder() / _name(family, seed=seed, shard_size=shard_size, **overrides)
    if not path.is_dir():
        tiny_model(family, seed, **overrides).save_pretrained(path, max_shard_size=shard_size)
        byte_tokenizer().save_pretrained(path)
    return path


def tiny_store(family: str, expert_bits: int = 4, dense_bits: int = 8, seed: int = 0, **overrides: Any) -> Path:
    """`tiny_checkpoint` converted, made once per process; copy it before changing it."""
    path = _folder() / _name(family, seed=seed, expert_bits=expert_bits, dense_bits=dense_bits, **overrides)
    if not path.is_dir():
        convert(tiny_checkpoint(family, seed, **overrides), path, expert_bits, dense_bits)
    return path


@cache
def _folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="fate-tiny-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _name(family: str, **settings: Any) -> str:
    text = repr(sorted(settings.items(), key=lambda item: item[0]))
    return f"{family}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
