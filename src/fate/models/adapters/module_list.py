"""Experts as a list of modules, as models have them whose code comes with the checkpoint: `experts[i](x)`.

Nothing is taken from names. What an expert computes is found out by trial: a copy of one, with random weights, must
give what a gated or plain feed-forward network of its matrices gives. The block's own code keeps routing and calls one
expert after the other, so there is nothing to foretell: experts are loaded on demand, each as it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from fate.models.adapters import Adaptation
from fate.models.adapters.stacked import StackedExperts, merge

Activation = Callable[[torch.Tensor], torch.Tensor]
LIST_NAMES = ("experts", "local_experts")
_TOKENS = 3


@dataclass(frozen=True)
class Recipe:
    """What one expert computes: down(act(first(x)) * second(x)), or without `second`. Names of its linear modules."""

    first: str
    second: str | None
    down: str
    act_fn: Activation


class ExpertList(StackedExperts):
    """Stands in place of the list: its items are called as the experts were."""

    asks_one_by_one = True

    def __init__(self, config: PreTrainedConfig, count: int, one: nn.Module, recipe: Recipe) -> None:
        first: Any = one.get_submodule(recipe.first)
        shape = (count, first.in_features, first.out_features)
        super().__init__(config, first.weight, shape, recipe.act_fn, has_gate=recipe.second is not None)

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int) -> Activation:
        if not -self.num_experts <= expert < self.num_experts:
            raise IndexError(expert)
        number = expert % self.num_experts
        return lambda x: self._one(number, x)

    def __iter__(self) -> Iterator[Activation]:
        return (self[expert] for expert in range(self.num_experts))

    def _one(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] -> the same, by one expert."""
        flat = x.reshape(-1, x.shape[-1])
        if not len(flat):
            return torch.empty_like(x)
        index = torch.full((len(flat), 1), expert, device=x.device)
        return self(flat, index, torch.ones_like(index, dtype=x.dtype)).view(x.shape)


def adapt(model: PreTrainedModel, done: Adaptation) -> None:
    """Replace every list that is recognised; `done.unknown` says of the others why not."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.ModuleList) or name.rpartition(".")[2] not in LIST_NAMES or len(module) < 2:
            continue
        try:
            recipe = recipe_of(module[0])
        except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            done.unknown[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, ExpertList(model.config, len(module), module[0], recipe))
        done.transforms += _transforms(f"{parent.rpartition('.')[2]}.{leaf}", recipe, done)


def _transforms(list_name: str, recipe: Recipe, done: Adaptation) -> list[WeightConverter]:
    """Of the lists of one name, once: from the experts' linear modules to the stacked parameters."""
    down = merge(f"{list_name}.*.{recipe.down}.weight", f"{list_name}.down_proj")
    if any(transform.source_patterns == down.source_patterns for transform in done.transforms):
        return []
    if recipe.second is None:
        return [down, merge(f"{list_name}.*.{recipe.first}.weight", f"{list_name}.up_proj")]
    sources = [f"{list_name}.*.{name}.weight" for name in (recipe.first, recipe.second)]
    operations = [MergeModulelist(dim=0), Concatenate(dim=1)]
    return [down, WeightConverter(sources, f"{list_name}.gate_up_proj", operations=operations)]


def recipe_of(expert: nn.Module) -> Recipe:
    """Raises ValueError with what is in the way."""
    linears = {name: module for name, module in expert.named_modules() if isinstance(module, nn.Linear)}
    inside = {id(parameter) for linear in linears.values() for parameter in linear.parameters()}
    if any(id(parameter) not in inside for parameter in expert.parameters()):
        raise ValueError("an expert has weights outside linear modules")
    if len(linears) not in (2, 3) or any(linear.bias is not None for linear in linears.values()):
        raise ValueError(f"an expert has {len(linears)} linear modules or biases, not two or three without")
    trial = deepcopy(expert).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.device("cpu"):  # also while the model is being built on the meta device
        for parameter in trial.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        for recipe in _candidates(trial, linears):
            x = torch.randn(_TOKENS, linears[recipe.first].in_features, generator=generator)
            if torch.allclose(trial(x), _compute(trial, recipe, x), rtol=1e-4, atol=1e-5):
                return recipe
    raise ValueError("an expert is no feed-forward network of its matrices, gated or plain")


def _candidates(trial: nn.Module, linears: dict[str, nn.Linear]) -> Iterator[Recipe]:
    for names in permutations(linears):
        first, down = linears[names[0]], linears[names[-1]]
        second = names[1] if len(names) == 3 else None
        fits = (down.in_features, down.out_features) == (first.out_features, first.in_features)
        if second is not None:
            fits = fits and linears[second].weight.shape == first.weight.shape
        if fits:
            for act_fn in _activations(trial):
                yield Recipe(names[0], second, names[-1], act_fn)


def _activations(trial: nn.Module) -> Iterator[Activation]:
    """The expert's own, and those that code calls by name."""
    own = [module for module in trial.modules() if not list(module.parameters()) and not list(module.children())]
    held = [value for value in vars(trial).values() if callable(value)]
    yield from (*own, *held, F.silu, F.gelu, F.relu)


def _compute(trial: nn.Module, recipe: Recipe, x: torch.Tensor) -> torch.Tensor:
    hidden = recipe.act_fn(trial.get_submodule(recipe.first)(x))
    if recipe.second is not None:
        hidden = hidden * trial.get_submodule(recipe.second)(x)
    out: torch.Tensor = trial.get_submodule(recipe.down)(hidden)
    return out
