"""Attention while decoding: one new token over the KV cache, read once, in the kernels; everything else is
transformers' sdpa.

On a CPU torch's sdpa takes 0.2 to 3.7 ms for one token of 16 heads in bfloat16 (64 to 1,024 positions, one thread),
ten to twenty times what reading the cache takes. `adopt` changes the attention of a model that would use sdpa, and
leaves alone models whose code asks for sdpa by name.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fate import kernels
from fate.kernels import threads
from fate.models.forms import ATTENTION_FUNCTION, ATTENTIONS, digest

_ASKS_BY_NAME = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)")
_CALLS_BY_NAME = re.compile(r"get_interface\(\s*self\.config\._attn_implementation")
_BEYOND = ("position_bias", "cache", "softcap")  # what only other implementations know, or sdpa alone


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [batch, heads, tokens, dim], key and value [batch, kv heads, positions, dim] -> [batch, tokens, heads,
    dim]. transformers' contract of an attention function."""
    if query.shape[2] == 1 and attention_mask is not None and hides_nothing(attention_mask):
        attention_mask = None
    one_token = query.shape[2] == 1 and attention_mask is None and not dropout
    scale, sinks = query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("s_aux")
    if one_token and kernels.can_attend(query, key, value) and all(kwargs.get(name) is None for name in _BEYOND):
        return kernels.attend(query, key, value, scale, sinks), None
    if sinks is not None:
        with threads.torch_too() if query.shape[2] > 1 else nullcontext():
            return _with_sinks(query, key, value, attention_mask, scale, sinks), None
    with threads.torch_too() if query.shape[2] > 1 else nullcontext():
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def _with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Attention with a score of each head that has no value, [heads]: what attention gives without it, times the share
    of the softmax that is left to the others."""
    heads, tokens = query.shape[1:3]
    key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    causal = mask is None and tokens > 1
    out, totals = flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)  # totals: logsumexp of scores
    left = torch.sigmoid(totals.float() - sinks.float().view(1, -1, 1))
    result: torch.Tensor = (out * left.unsqueeze(-1).to(out.dtype)).transpose(1, 2).contiguous()
    return result


def mask_unless_all(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """sdpa's mask, but None where one new token sees all positions there are, as it does of a sliding window's cache.
    transformers' contract of a mask function."""
    mask = sdpa_mask(*args, **kwargs)
    if mask is None or mask.shape[-2] != 1 or not kwargs.get("allow_is_causal_skip", True):
        return mask  # a model that reads its masks says so
    return None if hides_nothing(mask) else mask


def hides_nothing(mask: torch.Tensor) -> bool:
    """Whether a mask of transformers lets every position be seen."""
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())


class Copied(NamedTuple):
    """A configuration, the copy of it that names our function, and what it named itself."""

    config: Any
    ours: Any
    before: str


def follow(copies: Sequence[Copied]) -> None:
    """Where somebody has set another implementation since `adopt`, it counts for the copies too."""
    for config, ours, before in copies:
        named = object.__getattribute__(config, "__dict__").get("_attn_implementation_internal")
        if named != before:
            object.__setattr__(ours, "_attn_implementation_internal", named)


def adopt(model: PreTrainedModel) -> list[Copied]:
    """Use `attention_forward` where the model would have used sdpa, or has sinks, which sdpa does not know.

    Where code of the model asks for an implementation by name, or other parts have configurations of their own, only
    attention modules that do not ask are given a copy of theirs that names ours: what is returned, for `follow`."""
    config, asks = model.config, True
    with_sinks = not model._supports_sdpa and any(is_with_sinks(module) for module in model.modules())
    if not model._can_set_attn_implementation():
        return []
    instead_of = "eager" if with_sinks else "sdpa"
    with suppress(OSError, TypeError, KeyError):  # then what its code asks for is not known
        asks = _ASKS_BY_NAME.search(inspect.getsource(sys.modules[type(model).__module__])) is not None
    if not asks and not config.sub_configs:
        if config._attn_implementation == instead_of:
            model.set_attn_implementation(ATTENTION_FUNCTION)
        return []
    copies: dict[int, Copied] = {}
    for module in model.modules():
        own = module.__dict__.get("config")
        if getattr(own, "_attn_implementation", None) == instead_of and _takes_any_function(type(module).forward):
            if id(own) not in copies:
                copies[id(own)] = Copied(own, copy.copy(own), instead_of)
                object.__setattr__(copies[id(own)].ours, "_attn_implementation_internal", ATTENTION_FUNCTION)
            module.config = copies[id(own)].ours
    return list(copies.values())


@functools.cache
def _takes_any_function(forward: Callable[..., Any]) -> bool:
    """Whether it calls the attention function that the module's configuration names, and does not care which it is."""
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):
        return False
    return _CALLS_BY_NAME.search(source) is not None and _ASKS_BY_NAME.search(source) is None


def is_with_sinks(module: torch.nn.Module) -> bool:
    """Whether it is an attention module of a known form with sinks."""
    form = ATTENTIONS.get(digest(type(module).forward))
    return form is not None and form.sinks


AttentionInterface.register(ATTENTION_FUNCTION, attention_forward)
AttentionMaskInterface.register(ATTENTION_FUNCTION, mask_unless_all)
