"""What all fused modules share: becoming one, when a call may be quick, and the trial."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fate.kernels import native
from fate.kernels.fused import PackedMatrix
from fate.models.fused.guard import Guard, captures, is_capture
from fate.models.packed import PackedLinear

logger = logging.getLogger("fate.fused")
Answer = tuple[Tensor, ...]
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative, of a trial's answers


class Fused(nn.Module):
    """Mixin before a module's own class. A subclass names its kind's conditions and its two ways of answering."""

    MAX_TOKENS: ClassVar[int] = 8  # beyond these the operations around the products no longer matter

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        """Whether `module` holds what this kind holds; a trial decides the rest."""
        raise NotImplementedError

    @classmethod
    def take(cls, module: nn.Module) -> None:
        """Make `module` one of this kind."""
        own = type(module)
        module.__class__ = type(own.__name__, (cls, own), {"__module__": own.__module__, "__doc__": own.__doc__})
        module.__dict__["_agrees"] = {}

    def agrees(self, dtype: torch.dtype, *inputs: Any, also: Hashable = None) -> bool:
        """Whether the quick way gives what the module itself gives; tried once for each dtype, and `also` for whatever
        else the answer may depend on. inputs: `_trial`'s."""
        known: dict[Hashable, bool] = self.__dict__["_agrees"]
        if (answer := known.get((dtype, also))) is None:
            answer = known[dtype, also] = self._try(dtype, inputs)
        return answer

    def _try(self, dtype: torch.dtype, inputs: tuple[Any, ...]) -> bool:
        generator = torch.Generator().manual_seed(0)
        try:
            with torch.no_grad():
                return all(_near(ours, own, dtype) for ours, own in self._trial(generator, *inputs))
        except Exception as error:  # a family's module may be anything; its own forward still answers
            logger.info("%s is not fused: %s", type(self).__name__, error)
            return False

    def _trial(self, generator: torch.Generator, *inputs: Any) -> Iterable[tuple[Answer, Answer]]:
        """(ours, the module's own) answers to some inputs."""
        raise NotImplementedError


def rehearse(ask: Callable[[], bool | None]) -> bool | None:
    """What a rehearsal, beside an answer that is there already, says; False where it fails."""
    try:
        return ask()
    except Exception as error:  # whatever it is, the answer stands
        logger.info("a native call is not made: %s", error)
        return False


def may_be_quick(x: object) -> bool:
    """Whether a call on this input may take a native way: an ordinary tensor on the CPU, without gradients."""
    return (
        type(x) is Tensor
        and x.dtype in native.DTYPE_CODES
        and x.is_cpu
        and x.is_contiguous()
        and native.extension() is not None
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
    )


def passable(modules: Iterable[nn.Module | None], known: Collection[Any] = ()) -> bool:
    """Whether nobody wants to hear of calls of these modules, `known` apart, and none was given another forward."""
    if _has_any_global_hook():
        return False
    for module in modules:
        if module is not None:
            state = module.__dict__
            if state["_forward_pre_hooks"] or "forward" in state:
                return False
            others = [hook for hook in state["_forward_hooks"].values() if hook not in known]
            if others and (captures() or not all(is_capture(hook) for hook in others)):
                return False
    return True


def with_children(module: Any, **children: nn.Module) -> Any:
    """A copy of `module`, its weights shared, with these children in place of its own."""
    other = copy.copy(module)
    other.__dict__["_modules"] = {**module._modules, **children}
    return other


def without_hooks(module: Any) -> Any:
    """A copy of `module`, its weights shared, whose calls nobody hears of."""
    other = copy.copy(module)
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        other.__dict__[name] = type(module.__dict__[name])()
    return other


def is_packed(module: object) -> bool:
    return type(module) is PackedLinear and not module.layout.is_raw


def matrices(module: nn.Module, names: Iterable[str]) -> tuple[PackedMatrix, ...]:
    """Those of the module's packed children, in this order."""
    children: dict[str, Any] = module._modules
    return tuple(PackedMatrix(children[name]) for name in names)


def watch_packed(guard: Guard, module: Any) -> bool:
    """Have the guard watch a packed child, which is passed over."""
    guard.same(module.__dict__, "layout", "bias")
    guard.same_tensor(module.__dict__, "packed")
    guard.same_tensor(module._parameters, "bias")
    return guard.unheard(module)


def own_tensors(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers that the module itself has."""
    return [name for held in (module._parameters, module._buffers) for name, value in held.items() if value is not None]


def _near(ours: Answer, own: Answer, dtype: torch.dtype) -> bool:
    if len(ours) != len(own):
        return False
    for a, b in zip(ours, own, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or not bool(torch.isfinite(b).all()):
            return False
        if not (a.double() - b.double()).norm() <= TOLERANCE[dtype] * b.double().norm():
            return False
    return True
