"""Decoder layers that decode by two native calls: attention and routing; experts and sum.

`NativeDecoderLayer` is the mixin, `NativeLayer` the two calls of one layer, built once from its modules. A call that is
not one new token in each sequence over the planned cache, or whose modules somebody listens to, goes by the class's own
`forward`, whose modules compute the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fate.kernels import decode
from fate.models.attention import ATTENTION_FUNCTION
from fate.models.decode.block import BlockSpec, SparseBlock
from fate.models.decode.forms import ATTENTIONS, LAYERS, ROTATIONS, digest
from fate.models.decode.modules import NativeRMSNorm, is_packed, norm_of, packed_matrix
from fate.models.decode.watch import Watch, Watched, become, is_unhooked, own_class, records_outputs
from fate.models.kv_cache import planned

_NORMS = ("input_layernorm", "post_attention_layernorm")
_CHILDREN = {*_NORMS, "self_attn", "mlp"}
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
# Arguments that do not change what a new token attends to; any other must be None or False.
_HARMLESS = frozenset(
    ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings", "output_router_logits")
)


class NativeDecoderLayer(Watched):
    """Mixin of a decoder layer: `fate_native` is its `NativeLayer`, None while its modules must be called."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        native: NativeLayer | None = self.__dict__.get("fate_native")
        if native is not None and len(args) == 1 and (out := native.run(args[0], kwargs)) is not None:
            return out
        return super().forward(*args, **kwargs)


class NativeLayer:
    """One decoder layer of at most MAX_ROWS rows. layer: what computes its experts, None where the MLP is a module."""

    def __init__(
        self, module: Any, attention: decode.AttentionHalf, layer: Any, buffers: decode.Buffers, step: Any
    ) -> None:
        self._mlp = module.mlp
        self._index: int = module.self_attn.layer_idx
        self._head_dim: int = module.self_attn.head_dim
        self._attend, self._layer, self._buffers, self._step = attention, layer, buffers, step
        self._hidden: int = buffers.normed.shape[1]
        self._dtype = buffers.normed.dtype

    def run(self, x: Any, given: dict[str, Any]) -> Tensor | None:
        """The layer's output [rows, 1, hidden]; None, and nothing is done, for a call of another kind."""
        rows = self._step.native and self._rows(x, given)
        if not rows:
            return None
        cached = planned(given.get("past_key_values"), self._index)
        place = None if cached is None else cached.next_rows(rows, self._dtype)
        if cached is None or place is None:
            return None
        buffers = self._buffers
        with self._step.lock:
            routed = self._attend(buffers, x, given["position_embeddings"], place)
            cached.advance()
            if routed is not None:
                out: Tensor = self._layer.run_routed(routed, x, add_residual=True)
                return out
            residual, normed = (held[:rows].view(x.shape).clone() for held in (buffers.residual, buffers.normed))
        out = self._mlp(normed)
        return residual + (out[0] if isinstance(out, tuple) else out)

    def _rows(self, x: Any, given: dict[str, Any]) -> int:
        """How many rows there are; 0 where the call is of another kind."""
        if type(x) is not Tensor or x.dim() != 3 or x.shape[1] != 1 or x.shape[2] != self._hidden:
            return 0
        if x.dtype is not self._dtype or not x.is_contiguous() or given.get("attention_mask") is not None:
            return 0
        rows, rotary = x.shape[0], given.get("position_embeddings")
        # Layers of one step are called alike: what one has found out holds for the others.
        if rotary is None or rotary is not self._step.rotary or len(given) != self._step.num_arguments:
            if rows > decode.MAX_ROWS or not self._is_rotary(rotary, rows) or not all(map(_is_harmless, given.items())):
                return 0
            self._step.rotary, self._step.num_arguments = rotary, len(given)
        return 0 if records_outputs() else rows

    def _is_rotary(self, rotary: Any, rows: int) -> bool:
        """Whether it is cos and sin [rows or 1, 1, dim] of an even dim that fits a head."""
        if type(rotary) is not tuple or len(rotary) != 2:
            return False
        cos, sin = rotary
        return (
            all(type(t) is Tensor and t.dtype is self._dtype and t.is_contiguous() and t.dim() == 3 for t in rotary)
            and cos.shape == sin.shape
            and cos.shape[0] in (1, rows)
            and cos.shape[1] == 1
            and cos.shape[2] <= self._head_dim
            and cos.shape[2] % 2 == 0
        )


def _is_harmless(argument: tuple[str, Any]) -> bool:
    name, value = argument
    return name in _HARMLESS or value is None or value is False


def adopt_layers(model: nn.Module, watch: Watch) -> None:
    """Make the decoder layers of `model` that are of a known form ours, and watch what native calls pass over."""
    for module in model.modules():
        if isinstance(module, Watched) or digest(type(module).forward) not in LAYERS:
            continue
        children = {name: child for name, child in module._modules.items() if child is not None}
        if set(children) != _CHILDREN or not _is_ours(children["self_attn"]):
            continue
        if not all(isinstance(children[name], NativeRMSNorm) for name in _NORMS):
            continue
        become(module, NativeDecoderLayer, watch)
        for child in children["self_attn"].modules():
            if not isinstance(child, Watched):
                become(child, Watched, watch)
        if not isinstance(children["mlp"], Watched):
            become(children["mlp"], Watched, watch)


def _is_ours(attention: Any) -> bool:
    """Whether it is attention of a known form, on packed matrices whose heads fit one another."""
    forward = type(attention).forward
    if digest(forward) not in ATTENTIONS or _rotation(forward) not in ROTATIONS:
        return False
    children = {name: child for name, child in attention._modules.items() if child is not None}
    norms = set(children) & set(_HEAD_NORMS)
    if set(children) - norms != set(_LINEARS) or len(norms) == 1 or not all(is_packed(children[n]) for n in _LINEARS):
        return False
    return all(isinstance(children[name], NativeRMSNorm) for name in norms) and _heads_fit(attention)


def _rotation(forward: Any) -> tuple[str, str]:
    names = forward.__globals__
    rotate = names.get("apply_rotary_pos_emb")
    half = getattr(rotate, "__globals__", {}).get("rotate_half")
    return (digest(rotate) if rotate else "", digest(half) if half else "")


def _heads_fit(attention: Any) -> bool:
    q, k, v, o = (attention._modules[name] for name in _LINEARS)
    dim = getattr(attention, "head_dim", 0)
    widths = (q.out_features, k.out_features, v.out_features)
    return (
        isinstance(dim, int)
        and dim > 0
        and isinstance(getattr(attention, "scaling", None), float)
        and isinstance(getattr(attention, "layer_idx", None), int)
        and all(width % dim == 0 for width in widths)
        and o.in_features == q.out_features
        and k.out_features == v.out_features
        and q.out_features % k.out_features == 0
        and q.in_features == k.in_features == v.in_features == o.out_features
    )


def attention_half(module: Any, block: BlockSpec | None, dtype: torch.dtype) -> decode.AttentionHalf | None:
    """The first native call of a layer; None where somebody hears of its modules or they are not as they were."""
    attention, norms = module.self_attn, [norm_of(module._modules[name], dtype) for name in _NORMS]
    children = {name: child for name, child in attention._modules.items() if child is not None}
    listened = (module.self_attn, *children.values(), *(module._modules[name] for name in _NORMS))
    if (
        module.training
        or not all(map(is_unhooked, listened))
        or None in norms
        or not all(map(_as_built, children.items()))
    ):
        return None
    form, config = ATTENTIONS[digest(own_class(attention).forward)], attention.config
    if form.only_if_none is not None and getattr(config, form.only_if_none, None) is not None:
        return None
    if getattr(config, "_attn_implementation", None) != ATTENTION_FUNCTION or not _heads_fit(attention):
        return None
    query_norm, key_norm = (norm_of(children[n], dtype) if n in children else None for n in _HEAD_NORMS)
    if any(name in children and norm is None for name, norm in zip(_HEAD_NORMS, (query_norm, key_norm))):
        return None
    before, after = norms
    assert before is not None
    assert after is not None
    query, key, value, output = (packed_matrix(children[name]) for name in _LINEARS)
    if any(m.bias is not None and m.bias.dtype != dtype for m in (query, key, value, output)):
        return None
    return decode.AttentionHalf(
        input_norm=before,
        query=query,
        key=key,
        value=value,
        output=output,
        query_norm=query_norm,
        key_norm=key_norm,
        post_norm=after,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        router=None if block is None else block.router,
        dtype=dtype,
    )


def _as_built(item: tuple[str, nn.Module]) -> bool:
    name, child = item
    return is_packed(child) if name in _LINEARS else isinstance(child, NativeRMSNorm)


def is_sparse(mlp: nn.Module) -> bool:
    return isinstance(mlp, SparseBlock)
