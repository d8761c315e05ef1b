"""Families whose experts lie outside transformers' experts interface: one file each, named after the `model_type`.

An adapter changes a model that is still on the meta device: it puts an experts module with the interface in place of
the family's own, and says how checkpoint tensors make its parameters. Everything after that, conversion and runtime,
knows the interface alone. docs/adding-a-family.md shows how to write one.

>>> adapt(model)  # does nothing for a family that has the interface
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import Protocol, cast

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming


@dataclass
class Adaptation:
    """What adapters did to a model.

    transforms: how its checkpoints' tensors are named and converted, after what transformers itself knows. resident:
    names of experts modules that stay dense on purpose. top_k: experts a token uses, where the config does not say.
    note: what a user should know. unknown: names of experts modules that could not be recognised, and why.
    """

    transforms: list[WeightConverter | WeightRenaming] = field(default_factory=list)
    resident: set[str] = field(default_factory=set)
    top_k: int | None = None
    note: str = ""
    unknown: dict[str, str] = field(default_factory=dict)


class Adapter(Protocol):
    """A module of this package."""

    def adapt(self, model: PreTrainedModel, done: Adaptation) -> None: ...


def adapt(model: PreTrainedModel) -> Adaptation:
    """Apply the adapters of `model`'s and its sub-models' types, once; the model remembers what they did."""
    done = adaptation(model)
    if done is None:
        done = Adaptation()
        types = {module.config.model_type for module in model.modules() if isinstance(module, PreTrainedModel)}
        for adapter in filter(None, map(find_adapter, sorted(types))):
            adapter.adapt(model, done)
        importlib.import_module(f"{__name__}.module_list").adapt(model, done)  # whatever the model's type
        object.__setattr__(model, "_fate_adaptation", done)
    return done


def adaptation(model: PreTrainedModel) -> Adaptation | None:
    """What `adapt` did to the model; None if it was never called."""
    return cast("Adaptation | None", model.__dict__.get("_fate_adaptation"))


def find_adapter(model_type: str) -> Adapter | None:
    """The adapter of a model type, if it has one."""
    stem = model_type.replace("-", "_").replace(".", "_")
    name = f"{__name__}.{stem}"
    if not stem.isidentifier() or importlib.util.find_spec(name) is None:
        return None
    module = importlib.import_module(name)
    return cast(Adapter, module) if hasattr(module, "adapt") else None
