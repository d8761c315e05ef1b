"""Which families of the installed transformers use its experts interface: found in the modules' sources, not listed.

>>> [family.name for family in find_families()][:2]
['afmoe', 'aria']
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from fate.models import adapters
from fate.models.auto import AUTO_CLASSES

_MARK = "@use_experts_implementation"
# What stands in the way of a tiny model of these, whose text models are in the sweep.
NOT_BUILT = {
    "dots3_note": "its configuration is made from a text model of full size",
    "inkling_mm_model": "it needs scipy",
}


@dataclass(frozen=True)
class Family:
    """name: the folder in transformers. config: of its text model where an Auto class takes one alone, else the whole
    model's. model_type: of `config`."""

    name: str
    model_type: str
    config: type[PreTrainedConfig]


def find_families() -> list[Family]:
    """Every family with the interface, by name. A family without a configuration that an Auto class takes fails."""
    root = Path(transformers.__file__).parent / "models"
    sources = sorted(root.glob("*/modeling_*.py"))
    return [find_family(source.parent.name) for source in sources if _MARK in source.read_text()]


def find_adapted() -> list[Family]:
    """Every family that has an adapter, by model type."""
    files = {module.name for module in pkgutil.iter_modules(adapters.__path__)}
    types = [name for name in CONFIG_MAPPING if name.replace("-", "_") in files and adapters.find_adapter(name)]
    return [Family(name, name, CONFIG_MAPPING[name]) for name in sorted(types)]


def find_composites() -> list[Family]:
    """The models around a text model that is in a sweep on its own: with images, video or sound, as most repositories
    of these families are. Only their text path is put to the proof."""
    found = []
    for family in (*find_families(), *find_adapted()):
        for model_type in _model_types(family.config.__module__.split(".")[-2]):
            config = CONFIG_MAPPING[model_type]
            around = "text_config" in config.sub_configs and model_type != family.model_type
            if around and model_type not in NOT_BUILT and any(config in auto._model_mapping for auto in AUTO_CLASSES):
                found.append(Family(model_type, model_type, config))
    return found


def find_family(name: str) -> Family:
    """The family in transformers' folder `name`, with or without the interface."""
    if name in CONFIG_MAPPING and adapters.find_adapter(name):
        return Family(name, name, CONFIG_MAPPING[name])
    types = {model_type: CONFIG_MAPPING[model_type] for model_type in _model_types(name)}
    for auto in AUTO_CLASSES:
        mapping = auto._model_mapping  # type: ignore[attr-defined]
        taken = [model_type for model_type, config in types.items() if config in mapping]
        if taken:
            model_type = min(taken, key=lambda model_type: (not model_type.endswith("_text"), len(model_type)))
            return Family(name, model_type, types[model_type])
    raise LookupError(f"no Auto class takes a configuration of {name}")


def _model_types(name: str) -> list[str]:
    folder = Path(transformers.__file__).parent / "models" / name
    found = []
    for file in sorted(folder.glob("configuration_*.py")):
        module = importlib.import_module(f"transformers.models.{name}.{file.stem}")
        for value in vars(module).values():
            own = inspect.isclass(value) and issubclass(value, PreTrainedConfig) and value.__module__ == module.__name__
            if own and value.model_type in CONFIG_MAPPING:
                found.append(value.model_type)
    return found
