"""A KV cache that takes its memory once: what the plan's row says is what it uses.

transformers' growing cache concatenates at every token: it copies the whole cache each time and leaves the heap full
of holes, up to twice the planned size. Here a layer's buffer has room for the whole envelope from the first token on;
pages become resident as tokens are written.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


def planned_cache(config: PreTrainedConfig, max_context: int) -> DynamicCache:
    """A DynamicCache for `config` whose ordinary layers hold up to `max_context` tokens without reallocation.

    Layers of other kinds (sliding windows, linear attention) stay transformers' own.
    """
    cache = DynamicCache(config=config)
    if cache.layers:
        cache.layers = [PlannedLayer(max_context) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class PlannedLayer(DynamicLayer):
    """`keys` and `values` [batch, heads, tokens, dim] are views of the first tokens of larger buffers."""

    def __init__(self, max_context: int) -> None:
        super().__init__()
        self._max_context = max_context
        self._buffers: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [batch, heads, new tokens, dim]; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        self._buffers.clear()
        super().reset()

    def _append(self, name: str, held: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        tokens = held.shape[-2] if held is not None and held.numel() else 0
        total = tokens + new.shape[-2]
        buffer = self._buffers.get(name)
        if buffer is None or total > buffer.shape[-2] or (tokens and not _starts(buffer, held)):
            # the first tokens, or someone replaced the tensor (beam search reorders it)
            room = max(total, self._max_context)
            with torch.inference_mode(False):  # so that a later call outside inference mode may write to it
                buffer = torch.empty(*new.shape[:-2], room, new.shape[-1], dtype=new.dtype, device=new.device)
            if tokens and held is not None:
                buffer[..., :tokens, :] = held
            self._buffers[name] = buffer
        buffer.narrow(-2, tokens, new.shape[-2]).copy_(new)
        return buffer.narrow(-2, 0, total)


def _starts(buffer: torch.Tensor, view: torch.Tensor | None) -> bool:
    """Whether `view` is the first tokens of `buffer`."""
    return view is not None and view.data_ptr() == buffer.data_ptr() and view.stride() == buffer.stride()
