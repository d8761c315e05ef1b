"""A decoder layer of one new token in one native call, where its experts are in memory; a guard looks at the modules
that it passes over."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fate.kernels.block import BlockRun, PooledExperts, decoder_layer, half_form
from fate.models.fused.attention import FusedAttention, is_rotary
from fate.models.fused.base import may_be_quick
from fate.models.fused.block import FusedBlock
from fate.models.fused.guard import Guard
from fate.models.fused.norm import norm_of
from fate.models.kv_cache import PlannedLayer, planned

Halves = tuple[Tensor, Tensor]  # x + attention, and its norm
Room = tuple[Tensor, Tensor, int]  # see `PlannedLayer.room`


class WholeLayer:
    """Calls of one form on a decoder layer (`FusedLayer`), x [1, 1, hidden]. Made after such a call went the other
    quick way; ValueError where calls of this form cannot go this way."""

    def __init__(self, module: Any, x: Tensor, given: dict[str, Any]) -> None:
        attention, block, norms = (
            module.self_attn,
            module.mlp,
            (module.input_layernorm, module.post_attention_layernorm),
        )
        layer = block.layer_behind() if isinstance(block, FusedBlock) and x.shape[:2] == (1, 1) else None
        quiet = layer is not None and layer.quiet and not torch.is_grad_enabled()
        if layer is None or not quiet or not isinstance(attention, FusedAttention):
            raise ValueError("no layer of ours, one whose predictor is asked, or gradients may be wanted")
        before, after, head_norms = norm_of(norms[0], x), norm_of(norms[1], x), attention.takes(x, **given)
        self._guard = Guard()
        form = block.joined_form(layer, x[0], self._guard)
        watched = attention.watch(self._guard) and all(norm.watch(self._guard) for norm in norms)
        if before is None or after is None or head_norms is None or form is None or not watched:
            raise ValueError("someone wants to hear of what it passes over")
        self._children = module._modules
        self._guard.same(self._children, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        matrices, dim, dtype = attention.packed_matrices, attention.head_dim, x.dtype
        self._half = half_form((before, after), matrices, head_norms, dim, attention.scaling, dtype)
        self._block, self._layer, self._index, self._head_dim = form, layer, attention.layer_idx, dim
        self._shape, self._dtype, self._form = x.shape, dtype, _form(given)
        self.form: Hashable = (dtype, self._form, form[2])

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """What is copied or pickled finds out anew."""
        return type(None), ()

    def takes(self, module: Any, x: Any, given: dict[str, Any]) -> bool:
        """Whether a call is of this form, and nothing that it depends on has changed."""
        return (
            may_be_quick(x)
            and module._modules is self._children
            and not torch.is_grad_enabled()
            and x.dtype is self._dtype
            and x.shape == self._shape
            and _form(given) == self._form
            and is_rotary(given["position_embeddings"], x, self._head_dim)
            and self._guard.holds()
        )

    def run(self, x: Tensor, given: dict[str, Any]) -> Tensor | Halves | None:
        """The layer's answer; where an expert is not in memory, what its second half is asked with. None, and nothing
        is done, where the call must go other ways."""
        cached = planned(given["past_key_values"], self._index)
        return None if cached is None else self._compute(x, given["position_embeddings"], cached.room(1), cached)

    def gives(self, expected: Tensor, x: Tensor, given: dict[str, Any]) -> bool | None:
        """Whether it gives the bits that the other way has just given, the token's place in the cache being taken once
        more; None where that cannot be told now."""
        cached = planned(given["past_key_values"], self._index)
        if cached is None or (room := cached.room(1)) is None:
            return None
        keys, values, after = room
        places = [held.narrow(-2, after - 1, 1) for held in (keys, values)]
        kept = [place.clone() for place in places]
        try:
            out = self._compute(x, given["position_embeddings"], (keys, values, after - 1), None)
        finally:
            for place, states in zip(places, kept, strict=True):
                place.copy_(states)
        return torch.equal(out, expected) if isinstance(out, Tensor) else None

    def _compute(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], room: Room | None, cached: PlannedLayer | None
    ) -> Tensor | Halves | None:
        """cached: what is told of the token in `room`; None: it is a rehearsal."""
        if room is None or room[0].dtype != x.dtype or not room[0].is_cpu:
            return None

        def compute(experts: PooledExperts) -> BlockRun | Halves:
            ran = decoder_layer(x, self._half, self._block, rotary, room, experts)
            if cached is not None:
                cached.wrote()
            return ran

        ran = self._layer.compute_whole(compute, rehearsal=cached is None)
        if isinstance(ran, BlockRun):
            return ran.out
        return ran


def _form(given: dict[str, Any]) -> Hashable:
    """What kind of arguments a call has: flags as they are, of others the type; and how much of a head is rotated."""
    rotary = given.get("position_embeddings")
    dim = rotary[0].shape[-1] if type(rotary) is tuple else None
    return dim, *[(name, v if v is None or v is True or v is False else type(v)) for name, v in given.items()]
