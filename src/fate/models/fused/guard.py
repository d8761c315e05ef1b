"""What was found to hold of a model's modules, and whether it still does: asked in one native call, where looking at
each of them again would take the interpreter some hundred."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.utils import output_capturing

from fate.kernels import native


class Guard:
    """Gathers what an answer depends on, as it is now. Whatever is said of a module must hold when it is gathered."""

    def __init__(self) -> None:
        self._entries: list[tuple[dict[str, Any], str, Any]] = []
        self._sizes: list[tuple[dict[Any, Any], int]] = []
        self._tensors: list[tuple[Tensor, int]] = []
        self._captures = False  # whether transformers may want outputs
        self._gathered: tuple[tuple[Any, ...], ...] | None = None

    def same(self, held: dict[str, Any], *names: str) -> None:
        """These entries are what they are."""
        self._entries += [(held, name, held.get(name)) for name in names]

    def same_tensor(self, held: dict[str, Any], name: str) -> None:
        """This tensor is where it is, if there is one."""
        self.same(held, name)
        if isinstance(tensor := held.get(name), Tensor):
            self._tensors.append((tensor, tensor.data_ptr()))

    def unheard(self, module: nn.Module, known: Collection[Any] = ()) -> bool:
        """Nobody but `known` hears of the module's calls, and it has its class's forward, in the mode it is in; False,
        and the guard is of no use, where that is not so."""
        state = module.__dict__
        self.same(state, "forward", "training")
        for hooks in (state["_forward_hooks"], state["_forward_pre_hooks"]):
            for hook in hooks.values():
                if is_capture(hook):
                    self._captures = True
                elif hook not in known:
                    return False
            self._entries += [(hooks, number, hook) for number, hook in hooks.items()]
            self._sizes.append((hooks, len(hooks)))
        return "forward" not in state

    def holds(self) -> bool:
        """Whether all that is still so."""
        if self._gathered is None:
            self._gathered = tuple(self._entries), tuple(self._sizes), tuple(self._tensors)
        if _has_any_global_hook() or (self._captures and captures()):
            return False
        return bool(native.extension().unchanged(*self._gathered))


def is_capture(hook: Any) -> bool:
    """Whether it is transformers' own, which stays once any output was asked for."""
    return getattr(hook, "__module__", None) == output_capturing.__name__


def captures() -> bool:
    """Whether any output is asked for now."""
    return bool(output_capturing._active_collector.get())  # by name; None outside of a model's forward
