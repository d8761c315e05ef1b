"""Latent attention of a known form as a mixer of native calls.

While decoding, queries are taken to the latent space (`key_up`), so that a step multiplies nothing with the past. The
rows of `kv_b_proj` that give keys are kept once more for it, in the activations' dtype: `key_up_bytes` of memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fate import kernels
from fate.kernels import decode
from fate.models.decode.modules import NativeRMSNorm, children_of, is_packed, norm_of, packed_matrix
from fate.models.decode.watch import is_unhooked, own_class
from fate.models.forms import ATTENTION_FUNCTION, EXPAND_KV, LATENT_ATTENTIONS, LatentForm, digest

_ALWAYS = {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
_DIRECT, _THROUGH = {"q_proj"}, {"q_a_proj", "q_a_layernorm", "q_b_proj"}
_NORMS = {"q_a_layernorm", "kv_a_layernorm"}
_ATTRIBUTES = ("num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "layer_idx")


def is_ours(attention: Any) -> bool:
    """Whether it is latent attention of a known form, on packed matrices that fit one another."""
    cls = type(attention)
    form = LATENT_ATTENTIONS.get(digest(cls.forward))
    if form is None or digest(getattr(cls, "expand_kv", len)) != EXPAND_KV or not _turns(cls.forward, form):
        return False
    children = children_of(attention)
    if set(children) not in (_ALWAYS | _DIRECT, _ALWAYS | _THROUGH) or not _is_native(children):
        return False
    return all(isinstance(getattr(attention, name, None), int) for name in _ATTRIBUTES)


def build(attention: Any, dtype: torch.dtype) -> decode.LatentAttention | None:
    """The mixer; None where somebody hears of its modules or they are not as they were."""
    children, config = children_of(attention), attention.config
    form = LATENT_ATTENTIONS[digest(own_class(attention).forward)]
    if not all(map(is_unhooked, (attention, *children.values()))) or not _is_native(children):
        return None
    if getattr(config, "_attn_implementation", None) != ATTENTION_FUNCTION:
        return None
    norms = {name: norm_of(children[name], dtype) for name in _NORMS if name in children}
    latent_norm = norms["kv_a_layernorm"]
    matrices = {name: packed_matrix(child) for name, child in children.items() if name not in _NORMS}
    biases = [matrix.bias for matrix in matrices.values()]
    if None in norms.values() or latent_norm is None or any(b is not None and b.dtype != dtype for b in biases):
        return None
    rotation = form.rotate[2]
    if form.plain and not getattr(config, "rope_interleave", False):
        rotation = decode.Rotation.HALVES
    return decode.LatentAttention(
        query_down=matrices.get("q_a_proj"),
        query_norm=norms.get("q_a_layernorm"),
        query=matrices["q_b_proj"] if "q_b_proj" in matrices else matrices["q_proj"],
        latent=matrices["kv_a_proj_with_mqa"],
        latent_norm=latent_norm,
        key_up=_key_up(attention, dtype),
        up=matrices["kv_b_proj"],
        output=matrices["o_proj"],
        value_dim=attention.v_head_dim,
        scale=attention.scaling,
        rotation=rotation,
        dtype=dtype,
    )


def key_up_bytes(model: nn.Module, itemsize: int) -> int:
    """Of all layers."""
    return sum(m.num_heads * m.qk_nope_head_dim * m.kv_lora_rank * itemsize for m in _latent_attentions(model))


def latent_width(model: nn.Module) -> int:
    """Numbers of all heads' queries in the latent space, the most of any layer; 0 where there are none."""
    return max((m.num_heads * m.kv_lora_rank for m in _latent_attentions(model)), default=0)


def _latent_attentions(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if digest(type(module).forward) in LATENT_ATTENTIONS]


def _is_native(children: dict[str, Any]) -> bool:
    return all(isinstance(c, NativeRMSNorm) if n in _NORMS else is_packed(c) for n, c in children.items())


def _turns(forward: Any, form: LatentForm) -> bool:
    name, wanted, _ = form.rotate
    names = forward.__globals__
    if name not in names or digest(names[name]) != wanted:
        return False
    if not form.plain:
        return True
    plain, half = names.get("apply_rotary_pos_emb"), names.get("rotate_half")
    return plain is not None and half is not None and (digest(plain), digest(half)) == ("4a8f8b85ee37", "7b6c9b425ca0")


def _key_up(attention: Any, dtype: torch.dtype) -> Tensor:
    """[heads, plain, latent]: the rows of kv_b_proj that give keys."""
    heads, plain, value = attention.num_heads, attention.qk_nope_head_dim, attention.v_head_dim
    matrix = attention._modules["kv_b_proj"]
    rows = torch.arange(heads * (plain + value)).view(heads, plain + value)[:, :plain].reshape(-1)
    taken = kernels.gather_rows(matrix.packed, matrix.layout, 0, rows, dtype)
    return taken.view(heads, plain, attention.kv_lora_rank)
