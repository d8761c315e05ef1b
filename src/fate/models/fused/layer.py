"""Decoder layers of one new token in each sequence: all that comes before the MLP in one native call, which writes to
the KV cache itself where that is the planned one."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fate.kernels.fused import HeadNorms, Norm, attention_half
from fate.models.fused.attention import FusedAttention, TrialCache
from fate.models.fused.base import Answer, Fused, own_tensors, passable, rehearse, with_children
from fate.models.fused.norm import FusedRMSNorm, norm_of
from fate.models.fused.whole import WholeLayer
from fate.models.kv_cache import PlannedLayer, planned

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

    @classmethod
    def take(cls, module: nn.Module) -> None:
        super().take(module)
        module.__dict__["_whole"] = None  # how calls of the form last seen go in one native call, if they do
        module.__dict__["_same_bits"] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or self.training:
            return super().forward(*args, **kwargs)
        x, whole = args[0], self.__dict__["_whole"]
        known = whole is not None and whole.takes(self, x, kwargs)
        done = whole.run(x, kwargs) if known else None
        if isinstance(done, Tensor):
            return done
        half = self._half(x, kwargs) if done is None else done
        if half is None:
            return super().forward(x, **kwargs)
        residual, normed = half
        out = self.mlp(normed)
        out = residual + (out[0] if isinstance(out, tuple) else out)
        if not known:
            self.__dict__["_whole"] = self._proven_whole(x, kwargs, out)
        return out

    def _proven_whole(self, x: Tensor, given: dict[str, Any], out: Tensor) -> WholeLayer | None:
        """How further calls like this one, which gave `out`, go in one; the first time it must give the same bits."""
        try:
            whole = WholeLayer(self, x, given)
        except ValueError:
            return None
        proven: dict[Hashable, bool | None] = self.__dict__["_same_bits"]
        if proven.get(whole.form) is None:
            proven[whole.form] = rehearse(lambda: whole.gives(out, x, given))
        return whole if proven[whole.form] else None

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
        layer = planned(given["past_key_values"], attention.layer_idx)
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
