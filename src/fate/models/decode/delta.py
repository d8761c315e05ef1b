"""The gated delta rule of a known form as a mixer of native calls, and the places of its states in a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

from fate.kernels import decode
from fate.kernels.mixers import DeltaShape
from fate.models.decode.modules import children_of, is_packed, is_plain, packed_matrix
from fate.models.decode.watch import Watch, Watched, become, is_unhooked, own_class
from fate.models.forms import DELTA_HELPERS, DELTA_RULES, GATED_NORM, digest, form
from fate.models.kv_cache import is_growing

_HARMLESS = frozenset(("position_ids", "position_embeddings", "use_cache", "output_router_logits"))
_SEPARATE = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_JOINED = ("in_proj_qkvz", "in_proj_ba")
_ATTRIBUTES = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "conv_kernel_size", "layer_idx")


class NativeDeltaRule(Watched):
    """Mixin of a delta rule's module: prompts and single tokens, over a cache or none, in one native call."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__
        native: decode.DeltaRule | None = state.get("fate_native")
        given = dict(zip(("hidden_states", "cache_params", "attention_mask"), args)) | kwargs
        x, cache = given.pop("hidden_states", None), given.pop("cache_params", None)
        if native is None or not is_plain(x) or x.dtype is not native.dtype or x.dim() != 3 or self.training:
            return super().forward(*args, **kwargs)
        if any(value is not None and value is not False and name not in _HARMLESS for name, value in given.items()):
            return super().forward(*args, **kwargs)
        rows = x.shape[0]
        if cache is None:
            held = new_states(native, rows)
            return native(x, rows_of(*held))
        if not is_growing(cache) or not _begin(cache, state["layer_idx"], native, rows):
            return super().forward(*args, **kwargs)
        found = place(cache, state["layer_idx"], rows, native.dtype)
        return super().forward(*args, **kwargs) if found is None else native(x, found)


def is_ours(mixer: Any) -> bool:
    """Whether it is a delta rule of a known form."""
    cls = type(mixer)
    if digest(cls.forward) not in DELTA_RULES or getattr(mixer, "activation", None) != "silu":
        return False
    names = cls.forward.__globals__ if hasattr(cls.forward, "__globals__") else {}
    unwrapped = getattr(cls.forward, "__wrapped__", None)
    names = names if "l2norm" in names or unwrapped is None else unwrapped.__globals__
    if any(name not in names or digest(names[name]) != wanted for name, wanted in DELTA_HELPERS.items()):
        return False
    children = children_of(mixer)
    if set(children) != {*_inputs(mixer), "conv1d", "norm", "out_proj"} or not is_packed(children["out_proj"]):
        return False
    if form(children["norm"]) != GATED_NORM or children["norm"].activation != "silu":
        return False
    return all(isinstance(getattr(mixer, name, None), int) for name in _ATTRIBUTES)


def build(mixer: Any, dtype: torch.dtype) -> decode.DeltaRule | None:
    """The mixer; None where somebody hears of its modules or they are not as they were."""
    children = children_of(mixer)
    if not all(map(is_unhooked, (mixer, *children.values()))) or not is_packed(children["out_proj"]):
        return None
    conv, norm = children["conv1d"], children["norm"]
    inputs = [_input(children[name], dtype) for name in _inputs(mixer)]
    small: list[Tensor] = [conv.weight, norm.weight, mixer.dt_bias, mixer.A_log]
    if any(given is None for given in inputs) or any(t.requires_grad for t in small):
        return None
    if conv.weight.dtype != dtype or norm.weight.dtype != dtype or mixer.num_v_heads % mixer.num_k_heads:
        return None
    return decode.DeltaRule(
        inputs=[given for given in inputs if given is not None],
        conv=conv.weight.detach().squeeze(1).contiguous(),
        conv_bias=None if conv.bias is None else conv.bias.detach(),
        decay=(-mixer.A_log.detach().float().exp()).contiguous(),
        dt_bias=mixer.dt_bias.detach().float().contiguous(),
        norm=decode.Norm(norm.weight, float(norm.variance_epsilon), True),
        output=packed_matrix(children["out_proj"]),
        shape=DeltaShape(
            mixer.num_k_heads, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim, mixer.conv_kernel_size
        ),
        dtype=dtype,
    )


def place(cache: Any, index: int, rows: int, dtype: torch.dtype) -> decode.StateRows | None:
    """Where the states of `rows` sequences are; None where there are none yet, or somebody wants to hear of them."""
    if index >= len(cache.layers) or type(layer := cache.layers[index]) is not LinearAttentionLayer:
        return None
    if layer.record_past or not layer.has_previous_state[0] or "update_conv_state" in layer.__dict__:
        return None
    conv, state = layer.conv_states[0], layer.recurrent_states[0]
    if conv is None or state is None or conv.dtype != dtype or state.dtype != torch.float32:
        return None
    if conv.shape[0] != rows or state.shape[0] != rows or not (conv.is_contiguous() and state.is_contiguous()):
        return None
    return rows_of(conv, state)


def rows_of(conv: Tensor, state: Tensor) -> decode.StateRows:
    """The places of sequences whose states lie in these tensors, one after the other."""
    rows = conv.shape[0]
    conv_bytes, state_bytes = conv.nbytes // rows, state.nbytes // rows
    at, state_at = conv.data_ptr(), state.data_ptr()
    return decode.StateRows([(at + row * conv_bytes, state_at + row * state_bytes) for row in range(rows)])


def new_states(native: decode.DeltaRule, rows: int) -> tuple[Tensor, Tensor]:
    """Those of sequences that have seen nothing."""
    key_heads, value_heads, key_dim, value_dim, kernel = native.shape
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    with torch.inference_mode(False):  # so that a later call outside inference mode may write to them
        conv = torch.zeros(rows, channels, kernel, dtype=native.dtype)
        return conv, torch.zeros(rows, value_heads, key_dim, value_dim, dtype=torch.float32)


def _begin(cache: Any, index: int, native: decode.DeltaRule, rows: int) -> bool:
    """Give the layer of a new cache its states; False where it is of another kind."""
    if index >= len(cache.layers) or type(layer := cache.layers[index]) is not LinearAttentionLayer:
        return False
    if layer.record_past or layer.has_previous_state[0]:
        return not layer.record_past
    if layer.is_conv_states_initialized[0] or layer.is_recurrent_states_initialized[0]:
        return False
    conv, state = new_states(native, rows)
    layer.lazy_initialization(conv_states=conv, recurrent_states=state)
    layer.has_previous_state[0] = True
    return True


def _inputs(mixer: Any) -> tuple[str, ...]:
    return _JOINED if DELTA_RULES[digest(own_class(mixer).forward)] else _SEPARATE


def _input(module: nn.Module, dtype: torch.dtype) -> decode.PackedMatrix | Tensor | None:
    if is_packed(module):
        matrix = packed_matrix(module)
        return matrix if matrix.bias is None or matrix.bias.dtype == dtype else None
    weight = module._parameters.get("weight")
    if (
        weight is None
        or own_class(module) is not nn.Linear
        or weight.requires_grad
        or module._parameters.get("bias") is not None
    ):
        return None
    return weight.detach() if weight.dtype == dtype and weight.is_contiguous() else None


def adopt(model: nn.Module, watch: Watch) -> None:
    """Make the delta rules of `model` that are of a known form ours."""
    for module in model.modules():
        if not isinstance(module, Watched) and is_ours(module):
            become(module, NativeDeltaRule, watch)
            for child in module.modules():
                if not isinstance(child, Watched):
                    become(child, Watched, watch)
