"""Early routing: some blocks compute their shared expert before they ask their router. Asked at the block's entry, the
router names the missing experts while the shared expert still has to be computed.

Which blocks these are is observed, not known by name: in its first forward a block shows whether another of its
modules runs before the router and whether the router sees just what the block was given. The early word is only a
head start for reads: what counts as accessed, and enters the cache, is what the model itself routes. It is asked for
where the layer waits long enough for that to matter (`payoff.py`).
"""

from __future__ import annotations

import time
from typing import Any

import torch

from fate.engine.backend import LayerRuntime, pairs_per_expert
from fate.models.adapter import MoELayer
from fate.models.routers import RouterGate


class EarlyRouter:
    """Hooks on one block. `enabled`: whether the engine wants it."""

    def __init__(self, layer: MoELayer, gate: RouterGate, runtime: LayerRuntime) -> None:
        self.enabled = False
        self._gate = gate
        self._runtime = runtime
        self._num_experts = layer.num_experts
        self._possible: bool | None = None  # unknown until the block has been watched once
        self._given: torch.Tensor | None = None
        self._others_first = False
        assert layer.router is not None
        layer.block.register_forward_pre_hook(self._on_block, with_kwargs=True)
        runtime.hooks.append(self._on_block)  # where no predictor is asked, none of our demands is early
        self._watching = [layer.router.register_forward_pre_hook(self._on_router, with_kwargs=True)]
        for child in layer.block.children():
            if child not in (layer.router, layer.experts):
                self._watching.append(child.register_forward_pre_hook(self._on_other))

    @property
    def possible(self) -> bool:
        """Whether the block's router can be asked early; False until the block has been watched once."""
        return bool(self._possible)

    def _on_block(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._possible is False:
            return
        given = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(given, torch.Tensor):
            self._conclude(False)
        elif self._possible is None:
            self._given, self._others_first = given, False
        elif self.enabled and self._runtime.asks_early:
            start = time.perf_counter()
            pairs = self._pairs(given)
            if pairs is not None:
                self._runtime.begin_early(given.reshape(-1, given.shape[-1]), pairs, start)

    def _pairs(self, given: torch.Tensor) -> dict[int, int] | None:
        if (chosen := self._gate.chosen(given)) is not None:
            return dict.fromkeys(chosen, 1)
        routed = self._gate.route(given)
        return pairs_per_expert(*routed, self._num_experts) if routed is not None else None

    def _on_other(self, module: Any, args: tuple[Any, ...]) -> None:
        self._others_first = True

    def _on_router(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """kwargs: torch leaves them out where another thread's forward removes the hook meanwhile."""
        if self._given is not None:
            seen = args[0] if args else (kwargs or {}).get("hidden_states")
            self._conclude(self._others_first and isinstance(seen, torch.Tensor) and _same_data(seen, self._given))
            self._given = None

    def _conclude(self, possible: bool) -> None:
        """The block has been watched: a module with hooks takes longer to call."""
        self._possible = possible
        for hook in self._watching:
            hook.remove()


def _same_data(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() == b.numel() and a.data_ptr() == b.data_ptr()
