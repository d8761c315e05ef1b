"""What an experts module computes is found out by trial; what is a little different is not taken for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

import sweep.tiny_configs
from fate.kernels import SWIGLU, ExpertActivation
from fate.models.activation import recognise
from fate.models.adapter import build_meta_model, find_moe_layers
from sweep.discovery import find_family
from tiny import FAMILIES, tiny_config


class Experts(nn.Module):
    """As `use_experts_implementation` leaves an experts module, and with the numbers some of them hold."""

    is_concatenated = True
    limit, alpha, hidden_dim, num_experts = 7.0, 1.702, 64, 8
    _apply_gate = _default_apply_gate

    def __init__(self, act_fn: object, has_gate: bool = True) -> None:
        super().__init__()
        self.act_fn, self.has_gate = act_fn, has_gate
        for name in ("limit", "alpha", "hidden_dim", "num_experts"):
            setattr(self, name, getattr(type(self), name))


def gating(gate: Callable[[Any, Tensor, Tensor], Tensor], act_fn: object = F.silu) -> Experts:
    """Experts whose gating is `gate(module, gate, up)`."""

    class Own(Experts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return gate(self, *gate_up.chunk(2, dim=-1))

    return Own(act_fn)


ACTS = {
    "silu": ("silu", 1.0),
    "swish": ("silu", 1.0),
    "quick_gelu": ("silu", 1.702),
    "gelu": ("gelu", 1.0),
    "gelu_python": ("gelu", 1.0),
    "gelu_new": ("gelu_tanh", 1.0),
    "gelu_fast": ("gelu_tanh", 1.0),
    "gelu_accurate": ("gelu_tanh", 1.0),
    "gelu_pytorch_tanh": ("gelu_tanh", 1.0),
    "relu": ("relu", 1.0),
    "relu2": ("relu2", 1.0),
}


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("name", ACTS)
def test_activations_of_transformers(name: str, has_gate: bool) -> None:
    kind, alpha = ACTS[name]
    assert recognise(Experts(ACT2FN[name], has_gate)) == ExpertActivation(kind, has_gate, alpha=alpha)


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize(
    "name", ["gelu_10", "relu6", "mish", "leaky_relu", "linear", "tanh", "sigmoid", "laplace", "hardswish", "xielu"]
)
def test_other_activations_are_the_modules_own(name: str, has_gate: bool) -> None:
    assert recognise(Experts(ACT2FN[name], has_gate)) is None


def bounded(module: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)


def gpt_oss(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    gate, up = bounded(module, gate, up)
    return (up + 1) * gate * torch.sigmoid(gate * module.alpha)


def clamped(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    gate, up = bounded(module, gate, up)
    return F.silu(gate) * up


def clamped_after(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).clamp(max=module.limit) * bounded(module, gate, up)[1]


def in_float32(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


LIMIT = Experts.limit
GATINGS = {
    gpt_oss: ExpertActivation("silu", alpha=1.702, gate_max=LIMIT, up_limit=LIMIT, up_offset=1.0),
    clamped: ExpertActivation("silu", gate_max=LIMIT, up_limit=LIMIT),
    clamped_after: ExpertActivation("silu", act_max=LIMIT, up_limit=LIMIT),
    in_float32: SWIGLU,
}


@pytest.mark.parametrize("gate", GATINGS, ids=lambda gate: gate.__name__)
def test_gatings_of_families(gate: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    assert recognise(gating(gate)) == GATINGS[gate]


# Each is one of the forms but for one thing, which only some numbers show.
NEARLY = {
    "a limit no attribute holds": lambda m, g, u: F.silu(g.clamp(max=9.3)) * u.clamp(-9.3, 9.3),
    "a high limit": lambda m, g, u: F.silu(g) * u.clamp(max=1e5),
    "the gate bounded below too": lambda m, g, u: F.silu(g.clamp(-m.limit, m.limit)) * u.clamp(-m.limit, m.limit),
    "up bounded above only": lambda m, g, u: F.silu(g.clamp(max=m.limit)) * u.clamp(max=m.limit),
    "the gate bounded only": lambda m, g, u: F.silu(g.clamp(max=m.limit)) * u,
    "another alpha": lambda m, g, u: g * torch.sigmoid(g * 1.7) * u,
    "another offset": lambda m, g, u: F.silu(g) * (u + 0.5),
    "gate and up exchanged": lambda m, g, u: F.silu(u) * g,
    "something for zero": lambda m, g, u: torch.where(g == 0, 1.0, F.silu(g) * u),
    "a factor": lambda m, g, u: 1.001 * F.silu(g) * u,
    "a row's norm": lambda m, g, u: F.normalize(F.silu(g) * u, dim=-1),
    "a part of it": lambda m, g, u: (F.silu(g) * u)[:, :-1],
    "an error": lambda m, g, u: m.absent,
}


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_nearly_a_form_is_not_taken_for_it(name: str) -> None:
    assert recognise(gating(NEARLY[name])) is None


def test_an_activation_with_weights_is_the_modules_own() -> None:
    assert recognise(Experts(nn.PReLU(init=0.0))) is None  # today it is a ReLU


def test_an_activation_that_works_in_place_is_recognised() -> None:
    assert recognise(Experts(nn.ReLU(inplace=True))) == ExpertActivation("relu")


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_families_are_swiglu(family: str) -> None:
    layers = find_moe_layers(build_meta_model(tiny_config(family)))
    assert [recognise(layer.experts) for layer in layers] == [SWIGLU] * len(layers)


FORMS = {
    "gpt_oss": ExpertActivation("silu", True, True, alpha=1.702, gate_max=7.0, up_limit=7.0, up_offset=1.0),
    "openai_privacy_filter": GATINGS[gpt_oss],
    "minimax_m3_vl": GATINGS[gpt_oss],
    "nemotron_h": ExpertActivation("relu2", gated=False),
    "gemma4": ExpertActivation("gelu_tanh"),
    "inkling2": ExpertActivation("silu_softcap", gate_max=4.0, up_limit=25.0),
    "step3p7": ExpertActivation("silu", act_max=0.5, up_limit=0.5),
    "switch_transformers": ExpertActivation("relu", gated=False),
}


@pytest.mark.parametrize("family", FORMS)
def test_families(family: str) -> None:
    layers = find_moe_layers(build_meta_model(sweep.tiny_configs.tiny_config(find_family(family))))
    found = {recognise(layer.experts) for layer in layers}
    assert found - {SWIGLU} == {FORMS[family]}, "step3p7 clamps in some layers only"
