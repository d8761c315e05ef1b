"""Attention of one new token in each sequence, around the KV cache's own `update`: one native call before it (queries,
keys, values, their norms, rotation), one after it (attention, output matrix)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fate import kernels
from fate.kernels.fused import Norm, attend_project, project_heads
from fate.models.attention import ATTENTION_FUNCTION, attention_forward
from fate.models.fused.base import Answer, Fused, is_packed, may_be_quick, own_tensors, packed_matrix, passable
from fate.models.fused.norm import FusedRMSNorm, norm_of

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
# Arguments that do not change what one token attends to; others are for the module itself.
_HARMLESS = ("position_ids", "use_cache", "output_router_logits", "output_hidden_states")
_PAST = 5  # positions of a trial's cache
_SCALES = (1.0, 100.0)  # large inputs find what is clamped
_FAR = 1_000_000  # a position at which what depends on positions shows


class FusedAttention(Fused):
    """Llama's attention and its relatives: q, k, v (biases, norms of queries and keys), rotation in halves, o."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        children = module._modules
        names = {name for name, child in children.items() if child is not None}
        return (
            names - set(_NORMS) == set(_LINEARS)
            and len(names & set(_NORMS)) in (0, 2)
            and not own_tensors(module)
            and all(is_packed(children[name]) for name in _LINEARS)
            and all(isinstance(children[name], FusedRMSNorm) for name in names & set(_NORMS))
            and isinstance(getattr(module, "head_dim", None), int)
            and isinstance(getattr(module, "scaling", None), float)
            and isinstance(getattr(module, "layer_idx", None), int)
            and _heads_fit(module)
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and self._takes(**kwargs):
            hidden, cache = kwargs["hidden_states"], kwargs["past_key_values"]
            rotary, others = kwargs["position_embeddings"], {k: v for k, v in kwargs.items() if k in _HARMLESS}
            if self.agrees(hidden.dtype, hidden, rotary, others):
                return self._quick(hidden, rotary, cache), None
        return super().forward(*args, **kwargs)

    def _takes(
        self,
        hidden_states: Any = None,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> bool:
        if attention_mask is not None or past_key_values is None or self.training:
            return False
        if not may_be_quick(hidden_states) or hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
            return False
        if any(value is not None and value is not False and name not in _HARMLESS for name, value in others.items()):
            return False
        children = [child for child in self._modules.values() if child is not None]
        linears = [self._modules[name] for name in _LINEARS]
        return (
            getattr(self.config, "_attn_implementation", None) == ATTENTION_FUNCTION
            and hidden_states.shape[0] <= self.MAX_TOKENS
            and _is_rotary(position_embeddings, hidden_states, self.head_dim)
            and all(is_packed(linear) for linear in linears)
            and passable(*children)
            and self._norms(hidden_states) is not None
        )

    def _norms(self, x: Tensor) -> tuple[Norm | None, Norm | None] | None:
        """Of queries and keys; None where a module's norm is not ours."""
        found = [self._modules.get(name) for name in _NORMS]
        query, key = (norm_of(module, x) for module in found)
        missing = any(module is not None and norm is None for module, norm in zip(found, (query, key)))
        return None if missing else (query, key)

    def _quick(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        """hidden [batch, 1, hidden] -> [batch, 1, rows of o_proj]."""
        norms = self._norms(hidden)
        assert norms is not None
        query, key, value, output = (packed_matrix(self._modules[name]) for name in _LINEARS)
        q, k, v = project_heads(hidden[:, 0], (query, key, value), norms, rotary, self.head_dim)
        keys, values = cache.update(k, v, self.layer_idx)
        if kernels.can_attend(q, keys, values):
            return attend_project(q, keys, values, self.scaling, output)[:, None]
        attended, _ = attention_forward(self, q, keys, values, None, scaling=self.scaling)  # a cache of another kind
        return self.o_proj(attended.reshape(*hidden.shape[:-1], -1))

    def _trial(
        self, generator: torch.Generator, hidden: Tensor, rotary: tuple[Tensor, Tensor], others: dict[str, Any]
    ) -> Iterable[tuple[Answer, Answer]]:
        batch, dtype = hidden.shape[0], hidden.dtype
        kv_heads = self._modules["k_proj"].out_features // self.head_dim  # type: ignore[union-attr]
        for scale in _SCALES:
            x = (torch.randn(hidden.shape, generator=generator) * scale).to(dtype)
            turn = tuple(torch.rand(part.shape, generator=generator).mul(2).sub(1).to(dtype) for part in rotary)
            past = torch.randn(2, batch, kv_heads, _PAST, self.head_dim, generator=generator).to(dtype)
            if isinstance(others.get("position_ids"), Tensor):
                others = {**others, "position_ids": torch.full_like(others["position_ids"], _FAR)}
            own, weights = super().forward(
                hidden_states=x,
                position_embeddings=turn,
                attention_mask=None,
                past_key_values=_TrialCache(past),
                **others,
            )
            if weights is not None:
                raise ValueError("it gives attention weights")
            yield (self._quick(x, (turn[0], turn[1]), _TrialCache(past)),), (own,)


class _TrialCache:
    """What a KV cache does for one layer, once."""

    def __init__(self, past: Tensor) -> None:
        self._past = past

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self._past[0], key], dim=2), torch.cat([self._past[1], value], dim=2)


def _heads_fit(module: Any) -> bool:
    q, k, v, o = (module._modules[name] for name in _LINEARS)
    dim = module.head_dim
    widths = (q.out_features, k.out_features, v.out_features)
    return (
        all(width % dim == 0 for width in widths)
        and o.in_features == q.out_features
        and k.out_features == v.out_features
        and q.out_features % k.out_features == 0
        and q.in_features == k.in_features == v.in_features
    )


def _is_rotary(given: Any, hidden: Tensor, head_dim: int) -> bool:
    """cos and sin [batch or 1, 1, dim] of an even dim that fits a head."""
    if not isinstance(given, tuple) or len(given) != 2:
        return False
    return all(
        may_be_quick(part)
        and part.dtype == hidden.dtype
        and part.dim() == 3
        and part.shape[0] in (1, hidden.shape[0])
        and part.shape[1] == 1
        and part.shape[2] % 2 == 0
        and part.shape[2] <= head_dim
        for part in given
    ) and bool(given[0].shape == given[1].shape)
