"""Small modules of a decoder layer computed by our kernels, for any number of tokens.

They serve prompts, and layers that do not go by two native calls. The native calls are made of the same kernels, so
both ways give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fate.kernels import decode, native
from fate.models.adapter import is_silu
from fate.models.decode.watch import Watch, Watched, become, is_unhooked, own_class
from fate.models.forms import GATED_MLPS, RMS_NORMS, ROUTERS, digest
from fate.models.packed import PackedLinear

MOST_ROWS = 1024  # of a matrix that is not packed and yet multiplied natively
GATED = ("gate_proj", "up_proj", "down_proj")
_OF_GROUPS = ("n_group", "num_group", "topk_group")  # experts chosen within groups


def is_plain(x: object) -> bool:
    """Whether our kernels take this input: an ordinary contiguous tensor on the CPU, without gradients or autocast."""
    return (
        type(x) is Tensor
        and x.dtype in native.DTYPE_CODES
        and x.is_cpu
        and x.is_contiguous()
        and x.numel() > 0
        and native.extension() is not None
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
    )


def children_of(module: nn.Module) -> dict[str, Any]:
    """Its children by name, without those that are None."""
    return {name: child for name, child in module._modules.items() if child is not None}


def packed_matrix(module: nn.Module) -> decode.PackedMatrix:
    """The packed weight and bias of a `PackedLinear`."""
    assert isinstance(module, PackedLinear)
    return decode.PackedMatrix(module.packed, module.layout, module.bias)


def is_packed(module: object) -> bool:
    return isinstance(module, PackedLinear) and not module.layout.is_raw


class NativeRMSNorm(Watched):
    """weight * x / sqrt(mean(x^2) + eps)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and is_plain(args[0]):
            norm = norm_of(self, args[0].dtype)
            if norm is not None and args[0].shape[-1] == norm.weight.shape[0]:
                return decode.rms_norm(args[0], norm)
        return super().forward(*args, **kwargs)


def norm_of(module: nn.Module, dtype: torch.dtype) -> decode.Norm | None:
    """The norm of a `NativeRMSNorm` for activations of `dtype`; None where its weight is not of our kind."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype != dtype or weight.requires_grad or not weight.is_contiguous():
        return None
    state = module.__dict__
    eps = state["variance_epsilon"] if "variance_epsilon" in state else state["eps"]
    form = RMS_NORMS[digest(own_class(module).forward)]
    return decode.Norm(weight, float(eps), form.round_before_scale, form.plus_one)


class NativeRouter(Watched):
    """(logits, scores, indices) of a softmax router."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not self.training and is_plain(args[0]):
            router = router_of(self, args[0].dtype)
            if router is not None and args[0].shape[-1] == router.weight.shape[1]:
                return decode.route_rows(router, args[0].view(-1, args[0].shape[-1]))
        return super().forward(*args, **kwargs)


def router_of(module: nn.Module, dtype: torch.dtype) -> decode.Router | None:
    """The router of a `NativeRouter` for activations of `dtype`; None where it is not of our kind, or training."""
    weight, state = module._parameters.get("weight"), module.__dict__
    form = ROUTERS[digest(own_class(module).forward)]
    if weight is None or weight.dtype != dtype or weight.requires_grad or not weight.is_contiguous() or module.training:
        return None
    if form.only_if is not None and not _is_one_of(state.get(form.only_if[0]), form.only_if[1]):
        return None
    top_k: int = state["top_k"]
    renormalize = bool(state["norm_topk_prob"]) if form.renormalize is None else form.renormalize
    score_dtype = torch.float32 if form.float32_scores else dtype
    if not 0 < top_k <= weight.shape[0]:
        return None
    router = decode.Router(weight, top_k, renormalize, score_dtype, form.scoring, form.float_logits)
    if form.biased:
        bias = module._parameters.get("bias")
        return None if bias is None or bias.dtype != dtype or bias.requires_grad else router._replace(bias=bias)
    if form.group_best:
        return _in_groups(module, router, form.group_best)
    return None if any(state.get(name) not in (None, 1) for name in _OF_GROUPS) else router


def _in_groups(module: nn.Module, router: decode.Router, group_best: int) -> decode.Router | None:
    """The router with the module's groups, correction and scaling; None where they are not of our kind."""
    state, correction = module.__dict__, module._buffers.get("e_score_correction_bias")
    if correction is None:
        correction = module._parameters.get("e_score_correction_bias")
    if correction is not None and (correction.dtype != torch.float32 or correction.requires_grad):
        return None
    limited = state.get("topk_method", "") != "greedy"
    groups, top_groups = (state["num_group"], state["topk_group"]) if limited else (1, 1)
    experts = router.weight.shape[0]
    if not isinstance(groups, int) or not isinstance(top_groups, int) or not 0 < top_groups <= groups:
        return None
    if experts % groups or router.top_k > experts // groups * top_groups:
        return None
    if group_best > experts // groups and groups > 1:
        return None  # the module's own topk fails
    return router._replace(
        correction=correction,
        groups=groups,
        top_groups=top_groups,
        group_best=group_best,
        scaling=float(state["routed_scaling_factor"]),
    )


def _is_one_of(value: object, allowed: object) -> bool:
    return value in allowed if isinstance(allowed, tuple) else value == allowed


class NativeMLP(Watched):
    """down_proj(silu(gate_proj(x)) * up_proj(x)) on packed matrices."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not is_plain(args[0]) or not is_gated_silu(self):
            return super().forward(*args, **kwargs)
        x: Tensor = args[0]
        children: dict[str, Any] = self._modules
        gate, up, down = (children[name] for name in GATED)
        if all(map(is_unhooked, (gate, up, down))):
            matrices = packed_matrix(gate), packed_matrix(up), packed_matrix(down)
            return decode.gated_mlp(x.view(-1, x.shape[-1]), *matrices).view(*x.shape[:-1], down.out_features)
        return down(decode.silu_times(gate(x), up(x)))


def is_gated_silu(module: nn.Module) -> bool:
    """Whether the module's children are what `decode.gated_mlp` computes."""
    children: dict[str, Any] = module._modules
    act = children.get("act_fn") or module.__dict__.get("act_fn")
    packed = all(is_packed(children.get(name)) and children[name].bias is None for name in GATED)
    return packed and is_silu(act) and (not isinstance(act, nn.Module) or is_unhooked(act))


class NativeLinear(Watched):
    """A matrix of few rows that is not packed: the gate of a shared expert, a router's. torch's own product of one
    bfloat16 token takes ten times as long as reading the matrix, on some processors a hundred times."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if len(args) == 1 and not kwargs and is_plain(args[0]) and weight is not None:
            x: Tensor = args[0]
            fits = weight.dtype == x.dtype and weight.shape[1] == x.shape[-1] and weight.is_contiguous()
            few = weight.shape[0] == 1 or x.numel() <= decode.MAX_ROWS * x.shape[-1]
            if fits and few and bias is None and not weight.requires_grad:
                return decode.multiply_few_rows(x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
        return super().forward(*args, **kwargs)


def adopt(model: nn.Module, watch: Watch) -> None:
    """Give the modules of `model` that compute what ours do our forward. Changes no weight."""
    for module in model.modules():
        if isinstance(module, Watched):
            continue
        text = digest(type(module).forward)
        if text in RMS_NORMS and set(module._parameters) == {"weight"} and _helper(module) == RMS_NORMS[text].helper:
            become(module, NativeRMSNorm, watch)
        elif text in ROUTERS and "weight" in module._parameters:
            become(module, NativeRouter, watch)
        elif type(module) is nn.Linear and module.bias is None and module.weight.shape[0] <= MOST_ROWS:
            become(module, NativeLinear, watch)
        elif text in GATED_MLPS and all(is_packed(module._modules.get(name)) for name in GATED):
            become(module, NativeMLP, watch)


def _helper(module: nn.Module) -> str:
    """The digest of the `_norm` that the module's `forward` calls, "" where it has none."""
    helper = getattr(type(module), "_norm", None)
    return "" if helper is None else digest(helper)
