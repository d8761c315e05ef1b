"""Attention of a known form as a mixer of native calls: over all positions or a window, with sinks, with gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fate.kernels import decode
from fate.models.decode.modules import NativeRMSNorm, children_of, is_packed, norm_of, packed_matrix
from fate.models.decode.watch import is_unhooked, own_class
from fate.models.forms import ATTENTION_FUNCTION, ATTENTIONS, ROTATIONS, digest

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_HELPERS = ("rotate_half", "_apply_rotary_emb")


def is_ours(attention: Any) -> bool:
    """Whether it is attention of a known form, on packed matrices whose heads fit one another."""
    forward = type(attention).forward
    if digest(forward) not in ATTENTIONS or _rotation(forward) not in ROTATIONS:
        return False
    children = children_of(attention)
    norms = set(children) & set(_HEAD_NORMS)
    if set(children) - norms != set(_LINEARS) or len(norms) == 1 or not all(is_packed(children[n]) for n in _LINEARS):
        return False
    return all(isinstance(children[name], NativeRMSNorm) for name in norms) and _heads_fit(attention)


def build(attention: Any, dtype: torch.dtype) -> decode.Attention | None:
    """The mixer; None where somebody hears of its modules or they are not as they were."""
    children = children_of(attention)
    if not all(map(is_unhooked, (attention, *children.values()))) or not all(map(_as_built, children.items())):
        return None
    forward = own_class(attention).forward
    form, config = ATTENTIONS[digest(forward)], attention.config
    if form.only_if_none is not None and getattr(config, form.only_if_none, None) is not None:
        return None
    if getattr(config, "_attn_implementation", None) != ATTENTION_FUNCTION or not _heads_fit(attention):
        return None
    query_norm, key_norm = (norm_of(children[n], dtype) if n in children else None for n in _HEAD_NORMS)
    if any(name in children and norm is None for name, norm in zip(_HEAD_NORMS, (query_norm, key_norm))):
        return None
    query, key, value, output = (packed_matrix(children[name]) for name in _LINEARS)
    if any(m.bias is not None and m.bias.dtype != dtype for m in (query, key, value, output)):
        return None
    sinks = attention._parameters.get("sinks")
    if form.sinks and (sinks is None or sinks.requires_grad):
        return None
    return decode.Attention(
        query=query,
        key=key,
        value=value,
        output=output,
        query_norm=query_norm,
        key_norm=key_norm,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        dtype=dtype,
        rotation=ROTATIONS[_rotation(forward)],
        gated=form.gated,
        sinks=sinks.detach().float() if form.sinks and sinks is not None else None,
    )


def _rotation(forward: Any) -> tuple[str, str]:
    rotate = forward.__globals__.get("apply_rotary_pos_emb")
    names = getattr(rotate, "__globals__", {})
    helper = next((names[name] for name in _HELPERS if name in names), None)
    return (digest(rotate) if rotate else "", digest(helper) if helper else "")


def _heads_fit(attention: Any) -> bool:
    q, k, v, o = (attention._modules[name] for name in _LINEARS)
    dim = attention.__dict__.get("head_dim")
    queries = q.out_features // 2 if ATTENTIONS[digest(own_class(attention).forward)].gated else q.out_features
    return (
        isinstance(dim, int)
        and isinstance(getattr(attention, "layer_idx", None), int)
        and all(width % dim == 0 for width in (queries, k.out_features, v.out_features))
        and o.in_features == queries
        and k.out_features == v.out_features
        and queries % k.out_features == 0
        and q.in_features == k.in_features == v.in_features == o.out_features
    )


def _as_built(item: tuple[str, nn.Module]) -> bool:
    name, child = item
    return is_packed(child) if name in _LINEARS else isinstance(child, NativeRMSNorm)
