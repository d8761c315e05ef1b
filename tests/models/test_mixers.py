"""Mixers of native calls against the families' own modules in float64, whose matrices are the packed ones' numbers: one
token after another over a cache, alone and in a batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.deepseek_v2 import configuration_deepseek_v2, modeling_deepseek_v2
from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3
from transformers.models.gpt_oss import configuration_gpt_oss, modeling_gpt_oss
from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe, modeling_qwen3_5_moe
from transformers.models.qwen3_next import configuration_qwen3_next, modeling_qwen3_next

from fate.kernels import decode, native
from fate.models.attention import ATTENTION_FUNCTION
from fate.models.decode import attention, delta, latent
from fate.models.decode.modules import adopt
from fate.models.decode.watch import Watch
from fate.models.kv_cache import planned, planned_cache
from fate.models.packed import PackedLinear
from packed_records import random_record, relative_error

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")

HIDDEN, PROMPT, STEPS = 120, 7, 5
_QWEN = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 40,
}
_MLA = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "kv_lora_rank": 72,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "head_dim": 16,
    "v_head_dim": 40,
}
_GPT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "attention_bias": True,
}
_NEXT = configuration_qwen3_next.Qwen3NextConfig, modeling_qwen3_next, "Qwen3Next"
_QWEN35 = configuration_qwen3_5_moe.Qwen3_5MoeTextConfig, modeling_qwen3_5_moe, "Qwen3_5Moe"
_V2 = configuration_deepseek_v2.DeepseekV2Config, modeling_deepseek_v2, "DeepseekV2"
_V3 = configuration_deepseek_v3.DeepseekV3Config, modeling_deepseek_v3, "DeepseekV3"
_OSS = configuration_gpt_oss.GptOssConfig, modeling_gpt_oss, "GptOss"

CASES: dict[str, tuple[Any, dict[str, Any], str, int]] = {  # family, its settings, class, layer
    "qwen3_next delta": (_NEXT, _QWEN, "GatedDeltaNet", 0),
    "qwen3_5 delta": (_QWEN35, _QWEN, "GatedDeltaNet", 0),
    "qwen3_next attention": (_NEXT, _QWEN, "Attention", 1),
    "deepseek_v2": (_V2, {**_MLA, "q_lora_rank": None}, "Attention", 0),
    "deepseek_v2 through": (_V2, {**_MLA, "q_lora_rank": 56}, "Attention", 0),
    "deepseek_v3": (_V3, {**_MLA, "q_lora_rank": 56}, "Attention", 1),
    "deepseek_v3 in halves": (_V3, {**_MLA, "q_lora_rank": 56, "rope_interleave": False}, "Attention", 1),
    "gpt_oss window": (_OSS, _GPT, "Attention", 0),
    "gpt_oss": (_OSS, _GPT, "Attention", 1),
}


class Case:
    """One module twice: packed and ours, and in float64."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        (config_class, self.modeling, prefix), settings, cls, self.layer = CASES[name]
        torch.manual_seed(len(name))
        self.dtype, self.config = dtype, config_class(**settings, attn_implementation="eager")
        self.is_recurrent = cls == "GatedDeltaNet"
        own: nn.Module = getattr(self.modeling, prefix + cls)(self.config, self.layer).eval()
        for parameter in own.parameters():
            parameter.requires_grad_(False).normal_(0, 0.3)
        if self.is_recurrent:
            own.A_log.data.uniform_(-2, 1)
        pack(own)
        self.exact = copy.deepcopy(own)
        own = own.to(dtype)
        for packed in own.modules():
            if isinstance(packed, PackedLinear):
                packed.dtype = dtype
        self.exact.load_state_dict({name: value.double() for name, value in own.state_dict().items()}, strict=False)
        unpack(self.exact)
        self.exact.double()
        adopt(own, Watch())
        rotary: Any = getattr(self.modeling, next(n for n in vars(self.modeling) if n.endswith("RotaryEmbedding")))
        if hasattr(self.modeling, f"{prefix}TextRotaryEmbedding"):
            rotary = getattr(self.modeling, f"{prefix}TextRotaryEmbedding")
        self.rotary = rotary(self.config)
        kind: Any = delta if self.is_recurrent else latent if "deepseek" in name else attention
        assert kind.is_ours(own)
        own.config = copy.deepcopy(self.config)
        own.config._attn_implementation = ATTENTION_FUNCTION
        self.own = own
        self.mixer = kind.build(own, dtype)
        assert self.mixer is not None

    def angles(self, position: int, tokens: int, dtype: torch.dtype) -> Any:
        return self.rotary(torch.zeros(1, 1, dtype=dtype), torch.arange(position, position + tokens)[None])

    def exactly(self, x: Tensor) -> Tensor:
        """[rows, tokens, hidden] in float64, fed in float64 from the first token on, one by one."""
        cache = DynamicCache(config=self.config)
        out = []
        for at in range(x.shape[1]):
            token = x[:, at : at + 1]
            if self.is_recurrent:
                out.append(self.exact(token, cache_params=cache))
                continue
            turned = self.angles(at, 1, self.dtype)
            turned = turned.to(torch.complex128) if isinstance(turned, Tensor) else tuple(t.double() for t in turned)
            given = {"position_embeddings": turned, "attention_mask": None, "past_key_values": cache}
            out.append(self.exact(token, **given)[0])
        return torch.cat(out, dim=1)

    def natively(self, x: Tensor) -> Tensor:
        """[rows, tokens, hidden] from the second token on; the first is the modules', as it makes the cache."""
        rows = x.shape[0]
        ones = decode.Norm(torch.ones(HIDDEN, dtype=self.dtype), 0.0, False)
        half = decode.MixerHalf(ones, self.mixer, ones, None)
        buffers, cache = decode.Buffers(rows, HIDDEN, 1, 2, self.dtype), planned_cache(self.config, 64)
        if self.is_recurrent:
            self.own(normed(x[:, :1]), cache_params=cache)
        else:
            self.own.config._attn_implementation = "eager"
            given = {"position_embeddings": self.angles(0, 1, self.dtype), "attention_mask": None}
            self.own(normed(x[:, :1]), **given, past_key_values=cache)
        out = []
        for at in range(1, x.shape[1]):
            token = x[:, at].contiguous()
            if self.is_recurrent:
                place: Any = delta.place(cache, self.layer, rows, self.dtype)
                half(buffers, token, None, place)
            else:
                held = planned(cache, self.layer)
                assert held is not None
                half(buffers, token, self.angles(at, 1, self.dtype), held.next_rows(rows, self.dtype))
                held.advance()
            out.append(buffers.residual[:rows].double() - token.double())
        return torch.stack(out, dim=1)


def pack(module: nn.Module) -> None:
    for number, (name, child) in enumerate(list(module.named_children())):
        if isinstance(child, nn.Linear) and child.weight.numel() >= 1024:
            packed = PackedLinear(child, "int8", torch.float32)
            packed.packed = random_record(packed.layout, seed=number)
            setattr(module, name, packed)


def unpack(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, PackedLinear):
            linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
            linear.weight.data = child.weight.double()
            if child.bias is not None:
                linear.bias.data = child.bias.data.double()
            setattr(module, name, linear)


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True)).to(x.dtype)


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_a_mixer_computes_what_its_module_does(name: str) -> None:
    case = Case(name, torch.float32)
    x = torch.randn(2, 1 + STEPS + PROMPT, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = case.exactly(normed(x.double()))[:, 1:]
    assert relative_error(case.natively(x), expected) < 0.02  # activations are rounded to int8 on the way


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_the_bits_of_a_row_do_not_depend_on_the_others(name: str) -> None:
    case = Case(name, torch.bfloat16)
    x = torch.randn(3, 1 + STEPS, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16()
    together, alone = case.natively(x), case.natively(x[1:2])
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("name", [name for name in CASES if "delta" in name])
@torch.inference_mode()
def test_a_delta_rule_is_fed_in_pieces_with_the_same_bits(name: str) -> None:
    rule = Case(name, torch.bfloat16).mixer
    x = torch.randn(2, 40, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()

    def fed(pieces: int) -> Tensor:
        conv, state = delta.new_states(rule, 2)
        place = delta.rows_of(conv, state)
        return torch.cat([rule(part.contiguous(), place) for part in x.split(pieces, dim=1)], dim=1)

    whole = fed(40)
    assert torch.equal(whole, fed(1))
    assert torch.equal(whole, fed(7))
