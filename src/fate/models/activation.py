"""Which activation an experts module computes, found out by trial: nothing is taken from names.

The module's own `_apply_gate` (`act_fn` where nothing gates) is run on random and extreme numbers and compared with
what `ExpertActivation` gives for each form that some family has, with every number the module holds (its limit, its
alpha) in every place. What matches no form is computed by the module itself, around its matrices.

>>> recognise(experts_of_gpt_oss)
ExpertActivation(kind='silu', gated=True, interleaved=True, alpha=1.702, gate_max=7.0, act_max=inf, up_limit=7.0, ...)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from fate.kernels.activation import ExpertActivation

# Beyond any limit, and where exp over- and underflows; between them limits cannot hide.
_MAGNITUDES = (0.0, 1e-6, 0.01, 0.3, 1, 2, 3, 4, 5, 6, 7.5, 9, 12, 17, 25, 40, 60, 89, 110, 200, 1e3, 1e4, 1e6, 1e8)
_RANDOM_SCALES = (0.5, 2.0, 8.0, 50.0)
_RANDOM = 512  # pairs of each scale
_WIDTH = 16  # pairs of a row


def recognise(experts: nn.Module) -> ExpertActivation | None:
    """The form that gives what the module's own code gives; None where none does, or it depends on weights."""
    module: Any = experts
    held = getattr(module, "act_fn", None)
    if isinstance(held, nn.Module) and any(True for _ in (*held.parameters(), *held.buffers())):
        return None
    numbers = tuple(sorted(_numbers(module)))
    gate, up = _pairs(numbers)
    if not module.has_gate:
        hidden = gate
    elif module.is_concatenated:
        hidden = torch.cat((gate, up), dim=1)
    else:
        hidden = torch.stack((gate, up), dim=2).flatten(1)
    try:
        with torch.no_grad(), torch.device("cpu"):  # a model is built on the meta device
            own: Tensor = (module._apply_gate if module.has_gate else module.act_fn)(hidden.clone())
    except Exception:  # a model's own code, which wants something else than numbers of this shape
        return None
    if not isinstance(own, Tensor) or own.is_meta or own.shape != gate.shape:
        return None
    # Code may compute in float32; a sum of two nearly equal numbers is as exact as they are.
    bound = 1e-5 * own.abs() + 1e-6 * gate.abs() * (up.abs() + 1 if module.has_gate else 1)
    for form in _forms(module, numbers):
        if bool(((form(hidden) - own).abs() <= bound).all()):
            return form
    return None


def _forms(module: Any, numbers: tuple[float, ...]) -> Iterator[ExpertActivation]:
    """The likeliest first."""
    if not module.has_gate:
        yield from (ExpertActivation(kind, gated=False) for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2"))
        yield from (ExpertActivation("silu", gated=False, alpha=alpha) for alpha in (1.702, *numbers))
        return
    interleaved = not module.is_concatenated
    for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
        yield ExpertActivation(kind, True, interleaved)
    limits = [number for number in numbers if number > 0]
    for alpha, limit in product((1.0, 1.702, *limits), limits):
        yield ExpertActivation("silu", True, interleaved, alpha, gate_max=limit, up_limit=limit)
        yield ExpertActivation("silu", True, interleaved, alpha, gate_max=limit, up_limit=limit, up_offset=1.0)
        yield ExpertActivation("silu", True, interleaved, alpha, act_max=limit, up_limit=limit)
    for alpha in (1.702, *limits):
        yield ExpertActivation("silu", True, interleaved, alpha)
    for kind, limit in product(("gelu", "gelu_tanh", "relu", "relu2"), limits):
        yield ExpertActivation(kind, True, interleaved, gate_max=limit, up_limit=limit)
    for gate_max, up_limit in product(limits, limits):
        yield ExpertActivation("silu_softcap", True, interleaved, gate_max=gate_max, up_limit=up_limit)


def _numbers(module: nn.Module) -> set[float]:
    """What the module and its parts hold: limits and factors are among them."""
    values = (value for part in module.modules() for value in vars(part).values())
    return {float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and isfinite(v)}


@lru_cache(maxsize=8)  # a model's layers hold the same numbers
def _pairs(numbers: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(gate, up), float64 [rows, 16] each: every extreme value with every other, numbers around the module's own, and
    random ones."""
    around = [number * factor for number in numbers for factor in (0.9, 1.1)]
    sizes = torch.tensor([*_MAGNITUDES, *around], dtype=torch.float64, device="cpu").abs()
    values = torch.cat((sizes, -sizes))
    pairs = [torch.cartesian_prod(values, values)]
    generator = torch.Generator().manual_seed(0)
    for scale in _RANDOM_SCALES:
        pairs.append(scale * torch.randn(_RANDOM, 2, generator=generator, dtype=torch.float64, device="cpu"))
    every = torch.cat(pairs)
    every = every[torch.randperm(len(every), generator=generator, device="cpu")]  # what a row holds is anything
    gate, up = every[: len(every) // _WIDTH * _WIDTH].unbind(1)
    return gate.reshape(-1, _WIDTH), up.reshape(-1, _WIDTH)
