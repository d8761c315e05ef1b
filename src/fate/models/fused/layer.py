"""Decoder layers of one new token in each sequence: all that comes before the MLP in one native call, which writes to
the KV cache itself where that is the planned one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fate.kernels.fused import HeadNorms, Norm, attention_half
from fate.models.fused.attention import FusedAttention, TrialCache
from fate.models.fused.base import Answer, Fused, own_tensors, passable, with_children
from fate.models.fused.norm import FusedRMSNorm, norm_of
from fate.models.kv_cache import PlannedLayer

_NORMS = ("input_layernorm", "post_attention_layernorm")
_CHILDREN = {*_NORMS, "self_attn", "mlp"}
# A trial's scale of the input, and what the MLP gives of its own input. Where the first is small, a sum is what was
# added to it, and any factor of that shows.
_TRIALS = ((1e-3, 0.0), (1e-3, 100.0), (1.0, 0.0), (100.0, 0.0))


class FusedLayer(Fused):
    """y = x + self_attn(input_layernorm(x)), then y + mlp(post_attention_layernorm(y)): Llama's and its relatives'."""

    mlp: nn.Module

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        children = {name: child for name, child in module._modules.items() if child is not None}
        return (
            "DecoderLayer" in type(module).__name__
            and set(children) == _CHILDREN
            and not own_tensors(module)
            and isinstance(children["self_attn"], FusedAttention)
            and all(isinstance(children[name], FusedRMSNorm) for name in _NORMS)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not self.training and (half := self._half(args[0], kwargs)) is not None:
            residual, normed = half
            out = self.mlp(normed)
            return residual + (out[0] if isinstance(out, tuple) else out)
        return super().forward(*args, **kwargs)

    def _half(self, x: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """(x + attention, its norm), the token in the cache; None, and nothing is done, where that is not for us."""
        children: dict[str, Any] = self._modules
        attention, before, after = children["self_attn"], *(children[name] for name in _NORMS)
        if not isinstance(attention, FusedAttention) or "hidden_states" in given:
            return None
        head_norms = attention.takes(hidden_states=x, **given)
        if head_norms is None or not passable((attention, before, after)):
            return None
        norms = norm_of(before, x), norm_of(after, x)
        layer = _planned(given["past_key_values"], attention.layer_idx)
        if norms[0] is None or norms[1] is None or layer is None or (room := layer.room(x.shape[0])) is None:
            return None
        if room[0].dtype != x.dtype or not room[0].is_cpu:
            return None
        trial, form = (x, head_norms, given), attention.form(given)
        if not attention.agrees(x.dtype, *trial, also=form) or not self.agrees(x.dtype, *trial, also=form):
            return None
        half = self._quick(x, (norms[0], norms[1]), head_norms, given["position_embeddings"], room)
        layer.wrote()
        return half

    def _quick(
        self,
        x: Tensor,
        norms: tuple[Norm, Norm],
        head_norms: HeadNorms,
        rotary: tuple[Tensor, Tensor],
        room: tuple[Tensor, Tensor, int],
    ) -> tuple[Tensor, Tensor]:
        attention: Any = self._modules["self_attn"]
        matrices = attention.packed_matrices
        return attention_half(x, norms, matrices, head_norms, rotary, attention.head_dim, room, attention.scaling)

    def _trial(
        self, generator: torch.Generator, x: Tensor, head_norms: HeadNorms, given: dict[str, Any]
    ) -> Iterable[tuple[Answer, Answer]]:
        """Around MLPs that are a factor, so that no expert is asked for."""
        attention: Any = self._modules["self_attn"]
        for scale, factor in _TRIALS:
            x, call, past = attention.trial_call(generator, x, given, scale)
            mlp = _Factor(factor)
            theirs, ours = TrialCache(past), PlannedLayer(past.shape[-2] + 1)
            own = with_children(self, mlp=mlp)
            expected = super(FusedLayer, own).forward(x, **{**call, "past_key_values": theirs})
            if not isinstance(expected, Tensor):
                raise ValueError(f"it gives a {type(expected).__name__}")
            ours.update(*past)
            norms, room = [norm_of(self._modules[name], x) for name in _NORMS], ours.room(x.shape[0])
            assert norms[0] is not None
            assert norms[1] is not None
            assert room is not None
            residual, normed = self._quick(x, (norms[0], norms[1]), head_norms, call["position_embeddings"], room)
            ours.wrote()
            assert ours.keys is not None
            assert ours.values is not None
            yield (residual + mlp(normed), ours.keys, ours.values), (expected, theirs.keys, theirs.values)


class _Factor(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self._factor


def _planned(cache: Any, index: int) -> PlannedLayer | None:
    """The layer of the cache, where it is one that we may write to."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    replaced = "update" in cache.__dict__ or "update" in layer.__dict__  # someone wants to hear of it
    return layer if type(layer) is PlannedLayer and not replaced else None
