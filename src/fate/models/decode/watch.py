"""Changes of a loaded model, seen when they are made.

Weights and settings of a loaded model are frozen by contract: native calls are built from them once. A module that
native calls depend on is *watched*: whoever sets one of its attributes, or registers a hook on it, marks the model as
changed, and the next forward builds its native calls anew. Tensors that got other memory are found by comparing
addresses at the beginning of a forward. What goes past all of that (a write to a module's `__dict__` or `_modules`)
needs `model.fate.refresh()`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.utils import output_capturing


class Watch:
    """changed: since `restart`. Hooks that were there then are looked at in every forward: they may be removed."""

    def __init__(self) -> None:
        self._changed = False
        self._tensors: list[tuple[Tensor, int]] = []
        self._hooked: list[tuple[dict[int, Any], int]] = []

    def mark(self) -> None:
        self._changed = True

    def restart(self, tensors: Iterable[Tensor], modules: Iterable[nn.Module]) -> None:
        """Native calls were built from these tensors; these are the modules that stand in their place."""
        self._changed = False
        self._tensors = [(tensor, tensor.data_ptr()) for tensor in tensors]
        hooks = (held for m in modules for held in (m._forward_hooks, m._forward_pre_hooks) if held)
        self._hooked = [(held, len(held)) for held in hooks]

    def changed(self) -> bool:
        """Whether native calls must be built anew."""
        if self._changed:
            return True
        for tensor, address in self._tensors:
            if tensor.data_ptr() != address:
                return True
        return any(len(hooks) != count for hooks, count in self._hooked)


class Watched(nn.Module):
    """Mixin before a module's own class."""

    def __setattr__(self, name: str, value: Any) -> None:
        _mark(self)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        _mark(self)
        super().__delattr__(name)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        _mark(self)
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        _mark(self)
        return super().register_forward_pre_hook(*args, **kwargs)


def _mark(module: nn.Module) -> None:
    watch: Watch | None = module.__dict__.get("fate_watch")
    if watch is not None:
        watch.mark()


def become(module: nn.Module, mixin: type[Watched], watch: Watch) -> None:
    """Make `module` an instance of a subclass of its class, of the same name, that is a `mixin` too."""
    cls = type(module)
    if not issubclass(cls, mixin):
        body = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        object.__setattr__(module, "__class__", type(cls.__name__, (mixin, cls), body))
    module.__dict__["fate_watch"] = watch


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before it became one of ours."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, Watched) and issubclass(cls, nn.Module))


def is_unhooked(module: nn.Module) -> bool:
    """Whether no hook hears of calls but transformers' recorders of outputs and ours (`is_ours`), and `forward` is the
    class's own."""
    state = module.__dict__
    if state["_forward_pre_hooks"] or "forward" in state:
        return False
    return all(_is_recorder(hook) or getattr(hook, "is_ours", False) for hook in state["_forward_hooks"].values())


def hears_everything() -> bool:
    """Whether a hook on all modules is registered with torch."""
    return bool(_has_any_global_hook())


def records_outputs() -> bool:
    """Whether transformers records outputs of modules (`output_router_logits` and the like) in this forward."""
    return bool(output_capturing._active_collector.get())  # None outside of a model's forward


def _is_recorder(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == output_capturing.__name__
