"""Attention of one new token in each sequence, around the KV cache's own `update`: one native call before it (queries,
keys, values, their norms, rotation), one after it (attention, output matrix)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fate import kernels
from fate.kernels.fused import HeadNorms, PackedMatrix, attend_project, project_heads
from fate.models.attention import ATTENTION_FUNCTION, attention_forward
from fate.models.fused.base import (
    Answer,
    Fused,
    is_packed,
    matrices,
    may_be_quick,
    own_tensors,
    passable,
    watch_packed,
)
from fate.models.fused.guard import Guard
from fate.models.fused.norm import FusedRMSNorm, norm_of

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
# Arguments that do not change what one token attends to; others are for the module itself.
_HARMLESS = ("position_ids", "use_cache", "output_router_logits", "output_hidden_states")
_NO_NORMS = (None, None)
_IMPLEMENTATION = "_attn_implementation_internal"  # of attention, in a configuration
_PAST = 5  # positions of a trial's cache
_SCALES = (1.0, 100.0)  # large inputs find what is clamped
_FAR = 1_000_000  # a position at which what depends on positions shows


class FusedAttention(Fused):
    """Llama's attention and its relatives: q, k, v (biases, norms of queries and keys), rotation in halves, o."""

    config: Any
    head_dim: int
    layer_idx: int
    o_proj: nn.Module
    scaling: float

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

    @classmethod
    def take(cls, module: nn.Module) -> None:
        super().take(module)
        module.__dict__["_matrices"] = matrices(module, _LINEARS)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and (norms := self.takes(**kwargs)) is not None:
            hidden = kwargs.pop("hidden_states")
            if self.agrees(hidden.dtype, hidden, norms, kwargs, also=self.form(kwargs)):
                return self._quick(hidden, kwargs["position_embeddings"], norms, kwargs["past_key_values"]), None
            kwargs["hidden_states"] = hidden
        return super().forward(*args, **kwargs)

    @staticmethod
    def form(given: dict[str, Any]) -> Hashable:
        """What a call's answer may depend on besides numbers: a trial stands for calls of one form."""
        values = {name: given[name] for name in _HARMLESS if given.get(name) is not None}
        named = [(name, isinstance(value, Tensor) or bool(value)) for name, value in values.items()]
        return (*named, given["position_embeddings"][0].shape[2])

    @property
    def packed_matrices(self) -> tuple[PackedMatrix, PackedMatrix, PackedMatrix, PackedMatrix]:
        """Of queries, keys, values, output."""
        query, key, value, output = self.__dict__["_matrices"]
        return query, key, value, output

    def takes(
        self,
        hidden_states: Any = None,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> HeadNorms | None:
        """The norms of queries and keys, where the call may be quick; None otherwise."""
        if attention_mask is not None or self.training or not isinstance(past_key_values, DynamicCache):
            return None
        if not may_be_quick(hidden_states) or hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
            return None
        for name, value in others.items():
            if name not in _HARMLESS and value is not None and value is not False:
                return None
        children: dict[str, Any] = self._modules
        for name, matrix in zip(_LINEARS, self.__dict__["_matrices"]):
            if children[name] is not matrix.holder:
                return None
        takes = (
            hidden_states.shape[0] <= self.MAX_TOKENS
            and _attention_function(self.config) == ATTENTION_FUNCTION
            and is_rotary(position_embeddings, hidden_states, self.head_dim)
            and passable(children.values())
        )
        return self._norms(hidden_states) if takes else None

    def watch(self, guard: Guard) -> bool:
        """Have the guard watch what `takes` and the kernels depend on besides a call's arguments; False where someone
        wants to hear of calls."""
        children: dict[str, Any] = self._modules
        guard.same(children, *_LINEARS, *_NORMS)
        guard.same(self.__dict__, "config", "head_dim", "layer_idx", "scaling")
        guard.same(object.__getattribute__(self.config, "__dict__"), _IMPLEMENTATION)
        norms: list[Any] = [children[name] for name in _NORMS if name in children]
        return (
            guard.unheard(self)
            and all(watch_packed(guard, children[name]) for name in _LINEARS)
            and all(norm.watch(guard) for norm in norms)
        )

    def _norms(self, x: Tensor) -> HeadNorms | None:
        """Of queries and keys; None where a module's norm is not ours."""
        children: dict[str, Any] = self._modules
        if "q_norm" not in children:
            return _NO_NORMS
        query, key = norm_of(children["q_norm"], x), norm_of(children["k_norm"], x)
        return None if query is None or key is None else (query, key)

    def _quick(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], norms: HeadNorms, cache: Any) -> Tensor:
        """hidden [batch, 1, hidden] -> [batch, 1, rows of o_proj]."""
        query, key, value, output = self.packed_matrices
        q, k, v = project_heads(hidden[:, 0], (query, key, value), norms, rotary, self.head_dim)
        keys, values = cache.update(k, v, self.layer_idx)
        if kernels.can_attend(q, keys, values):
            return attend_project(q, keys, values, self.scaling, output)[:, None]
        attended, _ = attention_forward(self, q, keys, values, None, scaling=self.scaling)  # a cache of another kind
        return self.o_proj(attended.reshape(*hidden.shape[:-1], -1))

    def trial_call(
        self, generator: torch.Generator, hidden: Tensor, given: dict[str, Any], scale: float
    ) -> tuple[Tensor, dict[str, Any], Tensor]:
        """A call like the given one, elsewhere, with other numbers: hidden states, the other arguments but the cache,
        and that cache's keys and values [2, batch, kv heads, _PAST, head_dim]."""
        batch, dtype, kv_heads = hidden.shape[0], hidden.dtype, self.packed_matrices[1].rows // self.head_dim
        call = {"attention_mask": None, **given}
        if isinstance(call.get("position_ids"), Tensor):
            call["position_ids"] = torch.full_like(call["position_ids"], _FAR)
        x = (torch.randn(hidden.shape, generator=generator) * scale).to(dtype)
        rotary = given["position_embeddings"]
        cos, sin = (torch.rand(part.shape, generator=generator).mul(2).sub(1).to(dtype) for part in rotary)
        call["position_embeddings"] = (cos, sin)
        return x, call, torch.randn(2, batch, kv_heads, _PAST, self.head_dim, generator=generator).to(dtype)

    def _trial(
        self, generator: torch.Generator, hidden: Tensor, norms: HeadNorms, given: dict[str, Any]
    ) -> Iterable[tuple[Answer, Answer]]:
        for scale in _SCALES:
            x, call, past = self.trial_call(generator, hidden, given, scale)
            own, weights = super().forward(hidden_states=x, **{**call, "past_key_values": TrialCache(past)})
            if weights is not None:
                raise ValueError("it gives attention weights")
            yield (self._quick(x, call["position_embeddings"], norms, TrialCache(past)),), (own,)


class TrialCache:
    """What a KV cache does for one layer, once."""

    def __init__(self, past: Tensor) -> None:
        self.keys, self.values = past

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2)
        return self.keys, self.values


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


def _attention_function(config: Any) -> Any:
    """Which one the configuration names; its own attribute takes a dozen calls to read."""
    name = object.__getattribute__(config, "__dict__").get(_IMPLEMENTATION)
    return config._attn_implementation if name is None else name


def is_rotary(given: Any, hidden: Tensor, head_dim: int) -> bool:
    """cos and sin [batch or 1, 1, dim] of an even dim that fits a head."""
    if type(given) is not tuple or len(given) != 2:
        return False
    cos, sin = given
    if not may_be_quick(cos) or not may_be_quick(sin) or cos.dtype != hidden.dtype or sin.dtype != hidden.dtype:
        return False
    shape = cos.shape
    if len(shape) != 3 or sin.shape != shape or shape[1] != 1 or shape[0] not in (1, hidden.shape[0]):
        return False
    return bool(shape[2] <= head_dim and shape[2] % 2 == 0)
