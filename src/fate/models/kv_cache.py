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

from fate.kernels.decode import KVRows


def planned_cache(config: PreTrainedConfig, max_context: int) -> DynamicCache:
    """A DynamicCache for `config` whose ordinary layers hold up to `max_context` tokens without reallocation.

    Layers of other kinds (sliding windows, linear attention) stay transformers' own.
    """
    cache = DynamicCache(config=config)
    if cache.layers:
        cache.layers = [PlannedLayer(max_context) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def planned(cache: Any, index: int) -> PlannedLayer | None:
    """The layer of the cache, where it is one that may be written to by hand."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False) or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    replaced = "update" in cache.__dict__ or "update" in layer.__dict__  # someone wants to hear of it
    return layer if type(layer) is PlannedLayer and not replaced else None


class PlannedLayer(DynamicLayer):
    """`keys` and `values` [batch, heads, tokens, dim] are views of the first tokens of larger buffers, made when they
    are asked for; other tensors may be put in their place, as beam search and `crop` do."""

    def __init__(self, max_context: int) -> None:
        self._max_context = max_context
        self._buffers: dict[str, torch.Tensor] = {}
        self._tokens: int | None = None  # of the buffers; None: `_given` counts
        self._given: dict[str, torch.Tensor | None] = {}
        self._places: tuple[Any, ...] | None = None  # of the buffers' rows, once they were asked for
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        return self._held("keys")

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._give("keys", tensor)

    @property
    def values(self) -> torch.Tensor | None:
        return self._held("values")

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._give("values", tensor)

    def get_seq_length(self) -> int:
        return self._tokens if self._tokens is not None else super().get_seq_length()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [batch, heads, new tokens, dim]; returns all keys and values so far."""
        new = key_states.shape[-2]
        first = self.make_room(key_states, value_states)
        keys, values = self._buffers["keys"], self._buffers["values"]
        keys.narrow(-2, first, new).copy_(key_states)
        values.narrow(-2, first, new).copy_(value_states)
        self._tokens = first + new
        return keys.narrow(-2, 0, self._tokens), values.narrow(-2, 0, self._tokens)

    def make_room(self, key_states: torch.Tensor, value_states: torch.Tensor) -> int:
        """Buffers that take these states behind what is held, or others of their shape: the first new position."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states = {"keys": key_states, "values": value_states}
        held = self.get_seq_length()
        if self._tokens is None or held + key_states.shape[-2] > self._positions():
            self._give_all()
            self._places = None
            for name, new in states.items():
                self._buffers[name] = self._buffer(name, held, new)
                del self._given[name]  # one by one: what is copied is freed before the next buffer is made
            self._tokens = held
        return held

    def next_rows(self, rows: int, dtype: torch.dtype) -> KVRows | None:
        """Where the next token of each of `rows` sequences goes, for who writes keys and values there and then calls
        `advance`; None where that takes `update`."""
        if self._tokens is None or self._tokens >= self._positions():
            return None
        keys, values = self._buffers["keys"], self._buffers["values"]
        if keys.shape[0] != rows or keys.dtype != dtype or not keys.is_cpu:
            return None
        if self._places is None:
            self._places = _rows_of(keys), _rows_of(values), keys.stride()[1:3], values.stride()[1:3], [0] * rows
        keys_of, values_of, key_strides, value_strides, starts = self._places
        return KVRows(keys_of, values_of, key_strides, value_strides, starts, [self._tokens + 1] * rows)

    def advance(self) -> None:
        """The next position of every sequence was written."""
        assert self._tokens is not None
        self._tokens += 1

    def reset(self) -> None:
        self._buffers, self._places = {}, None
        super().reset()

    def _positions(self) -> int:
        """Of the smaller buffer."""
        return min(buffer.shape[-2] for buffer in self._buffers.values())

    def _held(self, name: str) -> torch.Tensor | None:
        if self._tokens is None:
            return self._given.get(name)
        return self._buffers[name].narrow(-2, 0, self._tokens)

    def _give(self, name: str, tensor: torch.Tensor | None) -> None:
        self._give_all()
        self._given[name] = tensor

    def _give_all(self) -> None:
        """From now on what is given counts, which so far is what the buffers hold."""
        if self._tokens is not None:
            self._given = {name: self._held(name) for name in self._buffers}
            self._tokens = None

    def _buffer(self, name: str, tokens: int, new: torch.Tensor) -> torch.Tensor:
        """Room for what is held and `new`: the buffer there is, if what is held is its first tokens."""
        held, buffer = self._held(name), self._buffers.get(name)
        total = tokens + new.shape[-2]
        if buffer is not None and total <= buffer.shape[-2] and tokens and _starts(buffer, held):
            return buffer
        room = max(total, self._max_context)
        with torch.inference_mode(False):  # so that a later call outside inference mode may write to it
            buffer = torch.empty(*new.shape[:-2], room, new.shape[-1], dtype=new.dtype, device=new.device)
        if tokens and held is not None:
            buffer[..., :tokens, :] = held
        return buffer


def _rows_of(buffer: torch.Tensor) -> list[int]:
    """The address of each sequence's first head and position."""
    step = buffer.stride(0) * buffer.element_size()
    return [buffer.data_ptr() + row * step for row in range(buffer.shape[0])]


def _starts(buffer: torch.Tensor, view: torch.Tensor | None) -> bool:
    """Whether `view` is the first tokens of `buffer`."""
    return view is not None and view.data_ptr() == buffer.data_ptr() and view.stride() == buffer.stride()
