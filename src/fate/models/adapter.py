"""Where a transformers model keeps its experts: the Mixture-of-Experts layers, their routers and matrix shapes.

Families are recognised by transformers' experts interface (`transformers.integrations.moe`), not by name: an experts
module carries the attributes that `use_experts_implementation` sets and two stacked weight parameters. Nothing here
reads or changes a weight, so a model on the meta device does.

>>> layers = find_moe_layers(build_meta_model(AutoConfig.from_pretrained("Qwen/Qwen1.5-MoE-A2.7B")))
>>> layers[0].name, layers[0].matrices[0]
('model.layers.0.mlp.experts', MatrixSpec(name='gate_up_proj', rows=2816, cols=2048))
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.activations import SiLUActivation

from fate.errors import NotMoEError, UnsupportedModelError
from fate.models.adapters import Adaptation, adapt, adaptation
from fate.models.adapters.module_list import LIST_NAMES
from fate.models.auto import auto_class
from fate.store.format import MatrixSpec

_INTERFACE = ("is_transposed", "is_concatenated", "has_gate", "has_bias", "has_post_expert_norm", "_is_expert_parallel")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One MoE layer. `block` holds both `experts` and, as a direct child, `router` (None where there is none).

    matrices: `[rows = output, cols = reduction]` whatever the module's `is_transposed`; empty when the module's
    weights have been dropped. aliases: other experts modules tied to this one's weights (a decoder's to its encoder's).
    """

    index: int
    name: str
    experts: nn.Module
    block_name: str
    block: nn.Module
    router: nn.Module | None
    num_experts: int
    matrices: tuple[MatrixSpec, ...]
    aliases: tuple[nn.Module, ...] = ()


def find_moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The model's MoE layers in execution order.

    Raises NotMoEError for a dense model and UnsupportedModelError for experts outside transformers' interface.
    """
    recorded = _recorded_router_classes(model)
    modules = dict(model.named_modules())
    layers: list[MoELayer] = []
    aliases = _tied_experts(model, modules)
    tied = {id(alias) for group in aliases.values() for alias in group}
    for name, module in modules.items():
        if not _is_experts(module) or id(module) in tied:
            continue
        block_name = name.rpartition(".")[0]
        block = modules[block_name]
        matrices = _matrices(name, module)
        layers.append(
            MoELayer(
                index=len(layers),
                name=name,
                experts=module,
                block_name=block_name,
                block=block,
                router=None if hasattr(module, "asks_one_by_one") else _find_router(block, module, recorded),
                num_experts=_num_experts(name, module),
                matrices=matrices,
                aliases=tuple(aliases.get(name, ())),
            )
        )
    _refuse_others(model, modules, layers)
    return layers


def build_meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` (see `auto_class`) with every parameter on the meta device, in the config's dtype.

    Raises UnsupportedModelError where transformers has no such architecture or needs code from the checkpoint.
    """
    try:
        with torch.device("meta"), initialization.no_init_weights(), initialization.meta_device_safe_creation_ops():
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(
            f"model type {config.model_type!r} cannot be built by the installed transformers "
            f" ({reason}): use a model that transformers supports without remote code"
        ) from error
    adapt(model)
    return cast(PreTrainedModel, model.eval())


def _tied_experts(model: PreTrainedModel, modules: dict[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """Name of an experts module -> those whose weights are tied to its own."""
    tied: dict[str, list[nn.Module]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        name, _, weight = target.rpartition(".")
        if weight == "down_proj" and _is_experts(modules[name]):
            tied.setdefault(source.rpartition(".")[0], []).append(modules[name])
    return tied


def _is_experts(module: nn.Module) -> bool:
    names = module._parameters
    return all(hasattr(module, attribute) for attribute in _INTERFACE) and "down_proj" in names


def _up_name(module: nn.Module) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _matrices(name: str, module: nn.Module) -> tuple[MatrixSpec, ...]:
    """Canonical shapes of the stacked weights; UnsupportedModelError where they are not what the interface says."""
    names = (_up_name(module), "down_proj")
    weights = [module._parameters.get(parameter) for parameter in names]
    if all(weight is None for weight in weights) and all(parameter in module._parameters for parameter in names):
        return ()
    extra = [key for key, p in module._parameters.items() if p is not None and p.ndim == 3 and key not in names]
    if extra:
        raise UnsupportedModelError(f"{name} has weights beyond {' and '.join(names)}: {', '.join(extra)}")
    specs = []
    for parameter, weight in zip(names, weights, strict=True):
        if weight is None or weight.ndim != 3:
            raise UnsupportedModelError(f"{name}.{parameter} is not one stacked [experts, rows, cols] parameter")
        rows, cols = weight.shape[:0:-1] if module.is_transposed else weight.shape[1:]
        specs.append(MatrixSpec(parameter, rows, cols))
    up, down = specs
    if up.rows != down.cols * (2 if module.has_gate else 1):
        raise UnsupportedModelError(f"{name} has {up.rows} {up.name} rows for {down.cols} down_proj columns")
    return tuple(specs)


def _num_experts(name: str, module: nn.Module) -> int:
    weight = module._parameters.get("down_proj")
    if weight is not None:
        return weight.shape[0]
    if isinstance(count := getattr(module, "num_experts", None), int):
        return count
    raise UnsupportedModelError(f"{name} does not say how many experts it has (no num_experts attribute)")


def is_silu(activation: object) -> bool:
    return isinstance(activation, nn.SiLU | SiLUActivation) or activation is nn.functional.silu


def _recorded_router_classes(model: PreTrainedModel) -> tuple[type[nn.Module], ...]:
    """Classes whose outputs transformers records as `router_logits`, over the model and its sub-models."""
    classes: list[type[nn.Module]] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorder: Any = (module._can_record_outputs or {}).get("router_logits", ())
            for entry in recorder if isinstance(recorder, list | tuple) else [recorder]:
                target = getattr(entry, "target_class", entry)
                if isinstance(target, type):
                    classes.append(target)
    return tuple(classes)


def _find_router(block: nn.Module, experts: nn.Module, recorded: tuple[type[nn.Module], ...]) -> nn.Module | None:
    siblings = [(name, child) for name, child in block.named_children() if child is not experts]
    rules = (
        lambda name, child: isinstance(child, recorded),
        lambda name, child: name in ("gate", "router"),
        lambda name, child: "Router" in type(child).__name__,
    )
    for rule in rules:
        found = [child for name, child in siblings if rule(name, child)]
        if len(found) == 1:
            return found[0]
    return None


def _refuse_others(model: PreTrainedModel, modules: dict[str, nn.Module], layers: list[MoELayer]) -> None:
    """Experts that are not behind the interface would be loaded whole; a model without any experts is dense."""
    done = adaptation(model) or Adaptation()
    inside = tuple(name + "." for name in (*(layer.name for layer in layers), *done.resident))
    for name, module in modules.items():
        known = _is_experts(module) or name in done.resident or name.startswith(inside)
        if not known and name.rpartition(".")[2] in LIST_NAMES and list(module.parameters()):
            raise UnsupportedModelError(
                f"model type {model.config.model_type!r} keeps experts outside transformers' experts interface: "
                f"{name} is a {type(module).__name__} {_broken_contract(name, module, done)}; docs/adding-a-family.md "
                "says what an adapter must do"
            )
    if layers:
        return
    config = model.config.get_text_config()
    if any((getattr(config, key, None) or 0) > 1 for key in _EXPERT_COUNTS):
        raise UnsupportedModelError(
            f"model type {model.config.model_type!r} has experts that no module exposes through transformers' "
            "experts interface (contract 1: one experts module a layer, weights stacked); docs/adding-a-family.md says "
            "what an adapter must do"
        )
    raise NotMoEError(
        f"model type {model.config.model_type!r} has no experts: fate runs Mixture-of-Experts models, "
        "load this one with transformers itself"
    )


def _broken_contract(name: str, module: nn.Module, done: Adaptation) -> str:
    """Which of the three contracts of docs/adding-a-family.md an experts module breaks."""
    if name in done.unknown:
        return f"that cannot be recognised: {done.unknown[name]} (contract 1: weights stacked, or experts in a list)"
    if "down_proj" not in module._parameters:
        return "without stacked gate_up_proj or up_proj, and down_proj (contract 1)"
    parameters = list(inspect.signature(type(module).forward).parameters)
    if len(parameters) != 4:
        return f"whose forward takes ({', '.join(parameters[1:])}), not hidden states, indices, weights (contract 2)"
    return "whose class is not declared with @use_experts_implementation (contract 1)"
