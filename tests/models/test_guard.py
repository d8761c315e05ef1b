"""A guard says whether anything changed of what it was shown."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.utils import output_capturing

from fate.kernels import native
from fate.models.fused.guard import Guard

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")


def hook(*args: object) -> None:
    """Somebody's."""


def guard_of(module: nn.Linear) -> Guard:
    guard = Guard()
    guard.same(module.__dict__, "in_features", "nowhere")
    guard.same_tensor(module._parameters, "weight")
    guard.same_tensor(module._parameters, "bias")
    assert guard.unheard(module, known=[hook])
    assert guard.holds()
    return guard


CHANGES = {
    "attribute": lambda module: setattr(module, "in_features", 7),
    "new attribute": lambda module: module.__dict__.update(nowhere=1),
    "no attribute": lambda module: module.__dict__.pop("in_features"),
    "parameter": lambda module: setattr(module, "weight", nn.Parameter(module.weight.clone())),
    "new parameter": lambda module: setattr(module, "bias", nn.Parameter(torch.zeros(3))),
    "data": lambda module: setattr(module.weight, "data", module.weight.data.clone()),
    "forward": lambda module: setattr(module, "forward", hook),
    "mode": lambda module: module.train(not module.training),
    "hook": lambda module: module.register_forward_hook(lambda *args: None),
    "pre-hook": lambda module: module.register_forward_pre_hook(lambda *args: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_noticed(change: str) -> None:
    module = nn.Linear(5, 3, bias=False)
    guard = guard_of(module)
    CHANGES[change](module)
    assert not guard.holds()


def test_known_hooks() -> None:
    module = nn.Linear(5, 3, bias=False)
    handle = module.register_forward_hook(hook)
    guard = guard_of(module)
    handle.remove()
    assert not guard.holds(), "one that is no longer called is a change too"
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        other = register(lambda *args: None)
        assert not Guard().unheard(module, known=[hook])
        other.remove()
    module.forward = hook  # type: ignore[method-assign]
    assert not Guard().unheard(module)


def test_hooks_of_everything() -> None:
    guard = guard_of(nn.Linear(5, 3, bias=False))
    with register_module_forward_hook(lambda *args: None):
        assert not guard.holds()
    assert guard.holds()


def test_hooks_that_capture_outputs() -> None:
    """Of transformers: they stay, and matter while an output is asked for."""
    module = nn.Linear(5, 3, bias=False)
    output_capturing.install_output_capuring_hook(module, "attentions", 1)
    guard = guard_of(module)
    token = output_capturing._active_collector.set({"attentions": []})
    assert not guard.holds()
    output_capturing._active_collector.reset(token)
    assert guard.holds()
