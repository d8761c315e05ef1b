"""Which checkpoint tensors make each parameter, by transformers' own conversion mapping, and making them.

transformers' loader stacks a whole layer of experts at once. Here one expert is made at a time: a copy of the
registered converter is fed that expert's tensors only, which gives the same bits in a fraction of the memory.

>>> sources = map_checkpoint(model, checkpoint.keys()).sources
>>> sources["model.layers.0.mlp.experts.down_proj"].keys
{'mlp.experts.*.down_proj.weight': ('model.layers.0.mlp.experts.0.down_proj.weight', ...)}
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from fate.convert.checkpoint import Checkpoint
from fate.errors import CheckpointError, UnsupportedModelError
from fate.models.adapters import adapt

Reader = Callable[[str], torch.Tensor]
_COMPARE_BYTES = 32 * 1024**2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Checkpoint tensors behind one parameter, or behind several where a converter splits (`name` is its first).

    keys: source pattern -> checkpoint keys in the order the converter stacks them; one pattern with one key where
    there is no converter.
    """

    name: str
    converter: WeightConverter | None
    keys: dict[str, tuple[str, ...]]

    @property
    def only_key(self) -> str:
        return next(iter(self.keys.values()))[0]

    def make(self, read: Reader, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Parameter name -> value, from tensors given by `read` (meta tensors give the shapes alone)."""
        if self.converter is None:
            return {self.name: read(self.only_key)}
        converter = deepcopy(self.converter)
        for pattern, keys in self.keys.items():
            for key in keys:
                converter.add_tensor(self.name, key, pattern, cast(Any, read(key)))
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def one_expert(self, expert: int, num_experts: int) -> Source:
        """This source narrowed to one expert's tensors, for checkpoints that store experts apart. A list that is split
        between several parameters, each of `num_experts`, keeps one for each of them."""
        several = self.converter is not None and len(self.converter.target_patterns) > 1
        stop = None if several else expert + 1
        kept = {pattern: keys[expert:stop:num_experts] for pattern, keys in self.keys.items()}
        return Source(self.name, self.converter, kept)

    def parameters(self, read: Reader, model: PreTrainedModel) -> list[str]:
        """The names of all parameters that it makes."""
        several = self.converter is not None and len(self.converter.target_patterns) > 1
        return list(self.make(read, model)) if several else [self.name]


@dataclass(frozen=True)
class KeyMap:
    """sources: by first parameter name. unused: checkpoint tensors no parameter takes, as transformers drops them."""

    sources: dict[str, Source]
    unused: tuple[str, ...]


def map_checkpoint(model: PreTrainedModel, keys: Iterable[str]) -> KeyMap:
    """Group checkpoint keys by the parameter they make, exactly as transformers' loader does."""
    transforms = [*get_model_conversion_mapping(model), *adapt(model).transforms]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    grouped: dict[str, tuple[WeightConverter | None, dict[str, list[str]]]] = {}
    unused = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # renamed by mistake; only the prefix may differ
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            unused.append(key)
            continue
        _, parts = grouped.setdefault(name, (by_pattern[pattern] if pattern else None, {}))
        parts.setdefault(pattern or key, []).append(key)
    sources = {
        name: Source(name, converter, {pattern: tuple(keys) for pattern, keys in parts.items()})
        for name, (converter, parts) in grouped.items()
    }
    return KeyMap(sources, tuple(unused))


def parameter_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtype transformers loads each parameter and persistent buffer in, its keep-in-fp32 lists respected."""
    plan = model._get_dtype_plan(model.dtype)
    if not plan:
        return {name: tensor.dtype for name, tensor in model.state_dict().items()}
    alternation, by_group, _ = build_glob_alternation(list(plan))
    dtypes = {}
    for name, tensor in model.state_dict().items():
        match = alternation.search(name)
        dtypes[name] = plan[by_group[match.lastgroup]] if match and match.lastgroup else tensor.dtype
    return dtypes


@dataclass(frozen=True)
class Recipe:
    """How one parameter is made: `source` gives it under the name `made`; loaded in `dtype`, of `shape`."""

    source: Source
    made: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def plan_recipes(model: PreTrainedModel, stacked: Collection[str], checkpoint: Checkpoint) -> dict[str, Recipe]:
    """Parameter or persistent buffer -> its recipe, in model order; tied parameters once, under the tie's source.

    stacked: experts' parameters, whose recipes are not tried out here (ExpertSource checks them). Weights that the
    config ties but whose values differ are untied in `model`, as transformers does. Raises CheckpointError where
    tensors are missing or of other shapes than the config's.
    """
    key_map = map_checkpoint(model, checkpoint.keys())
    dtypes, state = parameter_dtypes(model), model.state_dict()
    recipes: dict[str, Recipe] = {}
    for source in key_map.sources.values():
        dtype = dtypes[source.name]
        if source.name in stacked:
            for name in source.parameters(checkpoint.meta, model):
                recipes[name] = Recipe(source, name, dtype, tuple(state[name].shape))
            continue
        with _conversion_errors(source):
            made = source.make(partial(_shape_only, checkpoint, dtype), model)
        for name, value in made.items():
            if name in state:
                recipes[name] = Recipe(source, name, value.dtype, _checked_shape(name, value, state[name]))
    _resolve_ties(model, recipes, checkpoint)
    _refuse_missing(model, recipes)
    _report_unused(model, key_map.unused)
    return {name: recipes[name] for name in state if name in recipes}


def _shape_only(checkpoint: Checkpoint, dtype: torch.dtype, key: str) -> torch.Tensor:
    return checkpoint.meta(key).to(dtype)


def _checked_shape(name: str, value: torch.Tensor, expected: torch.Tensor) -> tuple[int, ...]:
    if value.shape != expected.shape:
        raise CheckpointError(
            f"{name} has shape {list(value.shape)}, the config says {list(expected.shape)}: the weights and "
            "config.json are of different models"
        )
    return tuple(value.shape)


def _resolve_ties(model: PreTrainedModel, recipes: dict[str, Recipe], checkpoint: Checkpoint) -> None:
    """Keep one recipe per group of tied parameters, under the tie's source, whichever of them the checkpoint holds."""
    for target, source in list(model.all_tied_weights_keys.items()):
        if target not in recipes:
            continue
        if source not in recipes:
            recipes[source] = recipes.pop(target)
        elif _same_values(recipes[target], recipes[source], checkpoint):
            del recipes[target]
        else:
            _log.warning("%s and %s differ in the checkpoint although the config ties them: not tied", target, source)
            del model.all_tied_weights_keys[target]


def _same_values(one: Recipe, other: Recipe, checkpoint: Checkpoint) -> bool:
    if one.shape != other.shape or one.source.converter or other.source.converter:
        return False
    keys = one.source.only_key, other.source.only_key
    step = max(1, _COMPARE_BYTES * one.shape[0] // max(1, checkpoint.nbytes(keys[0])))
    for start in range(0, one.shape[0], step):
        stop = min(start + step, one.shape[0])
        first, second = (checkpoint.read_rows(key, start, stop) for key in keys)
        if not torch.equal(first, second):
            return False
    return True


def _refuse_missing(model: PreTrainedModel, recipes: dict[str, Recipe]) -> None:
    """CheckpointError where transformers would make up values; tied targets and what it may ignore do not count."""
    ignored = model._keys_to_ignore_on_load_missing or ()
    pattern = re.compile("|".join(f"({entry})" for entry in ignored)) if ignored else None
    missing = [
        name
        for name in model.state_dict()
        if name not in recipes and name not in model.all_tied_weights_keys and not (pattern and pattern.search(name))
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{len(missing)} tensors are missing from the checkpoint: {', '.join(missing[:3])}{more}; "
            "download it again, or check that config.json belongs to these weights"
        )


def _report_unused(model: PreTrainedModel, unused: tuple[str, ...]) -> None:
    expected = re.compile("|".join((*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq")))
    surprising = [key for key in unused if not expected.search(key)]
    if unused:
        _log.log(
            logging.WARNING if surprising else logging.INFO,
            "%d checkpoint tensors are not used by %s and were left out (such as %s)",
            len(unused),
            type(model).__name__,
            (surprising or unused)[0],
        )


class ExpertSource:
    """Makes one expert's slice of the stacked `[experts, ...]` parameter of `recipe`.

    Experts may be stored apart (one tensor each) or stacked already (rows of one tensor). Raises CheckpointError
    where some experts are missing and UnsupportedModelError where an expert cannot be told apart.
    """

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self._recipe, self._checkpoint, self._model = recipe, checkpoint, model
        source, shape = recipe.source, recipe.shape
        firsts = [checkpoint.shape(keys[0]) for keys in source.keys.values()]
        one_key = all(len(keys) == 1 for keys in source.keys.values())
        self._apart = all(len(first) == len(shape) - 1 for first in firsts) and not (one_key and shape[0] > 1)
        if self._apart:
            self._check_counts()
        elif not one_key or any(not first or first[0] % shape[0] for first in firsts):
            raise UnsupportedModelError(
                f"{source.name} cannot be made one expert at a time from {source.only_key} of shape {list(firsts[0])}: "
                "use a checkpoint saved by transformers 5"
            )
        self._make(0, lambda key, start, stop: checkpoint.meta(key)[start:stop])

    def make(self, expert: int, *, transpose: bool = False) -> torch.Tensor:
        """The expert's matrix, of the parameter's shape without its first dimension, or that transposed."""
        value = self._make(expert, self._checkpoint.read_rows)
        value = value.T if transpose else value
        return value.reshape(-1).view(value.shape)  # torch calls a column contiguous whatever its strides

    def _make(self, expert: int, read_rows: Callable[[str, int, int], torch.Tensor]) -> torch.Tensor:
        source, shape = self._recipe.source, self._recipe.shape
        if self._apart:
            source = source.one_expert(expert, shape[0])

        def read(key: str) -> torch.Tensor:
            rows = self._checkpoint.shape(key)[0]
            if not self._apart:  # of a stacked or flat tensor: its share of the rows
                rows //= shape[0]
            start = 0 if self._apart else expert * rows
            return read_rows(key, start, start + rows).to(self._recipe.dtype)

        with _conversion_errors(source):
            value = source.make(read, cast(Any, _OneExpert(self._model, shape)))[self._recipe.made]
        if value.shape != (1, *shape[1:]):
            raise CheckpointError(
                f"{source.name}: expert {expert} has shape {list(value.shape[1:])}, the config says {list(shape[1:])}: "
                "the weights and config.json are of different models"
            )
        return value[0]

    def _check_counts(self) -> None:
        source = self._recipe.source
        shared_by = len(source.converter.target_patterns) if source.converter else 1
        spare = getattr(self._model.get_submodule(self._recipe.made.rpartition(".")[0]), "spare_keys", 0)
        num_experts = self._recipe.shape[0]
        for pattern, keys in source.keys.items():
            if len(keys) not in (num_experts, num_experts * shared_by, num_experts + spare):
                raise CheckpointError(
                    f"{source.name} needs {self._recipe.shape[0]} tensors like {pattern}, the checkpoint "
                    f"has {len(keys)}: download it again"
                )


class _OneExpert:
    """`model` as a converter sees it that compares its tensors with the parameter they are for, of one expert."""

    def __init__(self, model: PreTrainedModel, shape: tuple[int, ...]) -> None:
        self.config = model.config
        self._shape = (1, *shape[1:])

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self._shape, device="meta")


@contextmanager
def _conversion_errors(source: Source) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{source.name} cannot be made from {source.only_key} ({str(error).splitlines()[0]}): "
            "the weights and config.json are of different models"
        ) from error
