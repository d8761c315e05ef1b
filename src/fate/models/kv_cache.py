"""A KV cache that takes its memory once: what the plan's row says is what it uses.

transformers' growing cache concatenates at every token: it copies the whole cache each time and leaves the heap full
of holes, up to twice the planned size. Here a layer's buffer has room for the whole envelope from the first token on;
pages become resident as tokens are written.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fate.kernels.decode import KVRows


def planned_cache(config: PreTrainedConfig, max_context: int) -> DynamicCache:
    """A DynamicCache for `config` whose ordinary layers hold up to `max_context` tokens without reallocation.

    Layers of other kinds (linear attention) stay transformers' own.
    """
    cache = DynamicCache(config=config)
    if cache.layers:
        cache.layers = [_planned_layer(layer, max_context) for layer in cache.layers]
    return cache


def _planned_layer(layer: Any, max_context: int) -> Any:
    if type(layer) is DynamicLayer:
        return PlannedLayer(max_context)
    if type(layer) is DynamicSlidingWindowLayer:
        return PlannedSlidingLayer(layer.sliding_window, max_context)
    return layer


def plan_layers(cache: Any, max_context: int) -> None:
    """Give a cache that transformers made, and that holds something already, the layers of `planned_cache`."""
    if not is_growing(cache):
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
            continue
        made = _planned_layer(layer, max_context)
        made.lazy_initialization(layer.keys, layer.values)
        made.keys, made.values = layer.keys, layer.values
        if isinstance(layer, DynamicSlidingWindowLayer):
            made.cumulative_length, made.record_past = layer.cumulative_length, layer.record_past
        cache.layers[index] = made


def is_growing(cache: Any) -> bool:
    """Whether it is a cache of transformers' growing kind that nobody wants to hear of."""
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False) and "update" not in cache.__dict__


def planned(cache: Any, index: int) -> PlannedLayer | PlannedSlidingLayer | None:
    """The layer of the cache, where it is one that may be written to by hand."""
    if not is_growing(cache) or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    replaced = "update" in layer.__dict__  # someone wants to hear of it
    return layer if type(layer) in (PlannedLayer, PlannedSlidingLayer) and not replaced else None


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
        if self._tokens is None and not self._take_given():
            return None
        if self._tokens is None or self._tokens >= self._positions():
            return None
        keys, values = self._buffers["keys"], self._buffers["values"]
        if keys.shape[0] != rows or keys.dtype != dtype or not keys.is_cpu:
            return None
        if self._places is None:
            self._places = _rows_of(keys), _rows_of(values), keys.stride()[1:3], values.stride()[1:3], [0] * rows
        keys_of, values_of, key_strides, value_strides, starts = self._places
        return KVRows(keys_of, values_of, key_strides, value_strides, starts, [self._tokens + 1] * rows)

    def _take_given(self) -> bool:
        """Move what was put in the place of keys and values to buffers."""
        keys, values = self._given.get("keys"), self._given.get("values")
        if keys is None or values is None or keys.dim() != 4 or keys.shape[-2] == 0 or not keys.is_cpu:
            return False
        self.make_room(keys[..., :1, :], values[..., :1, :])
        return True

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


class PlannedSlidingLayer(DynamicSlidingWindowLayer):
    """The last positions of a sliding window. While decoding they move through a buffer of two windows, and are copied
    to its beginning once a window; transformers' own layer copies all of them at every token."""

    keys: torch.Tensor  # once it is initialized
    values: torch.Tensor

    def __init__(self, sliding_window: int, max_context: int) -> None:
        super().__init__(sliding_window)
        self._room = min(2 * sliding_window, max(max_context, sliding_window))
        self._buffers: dict[str, torch.Tensor] = {}
        self._first = self._end = 0  # of the positions that are kept, in the buffers
        self._places: tuple[Any, ...] = ()

    def next_rows(self, rows: int, dtype: torch.dtype) -> KVRows | None:
        """See `PlannedLayer.next_rows`."""
        if not self.is_initialized or self.record_past or self.keys.shape[0] != rows or self.keys.dtype != dtype:
            return None
        if not self._is_in_buffers() or self._end >= self._room:
            if not self.keys.is_cpu or self.keys.shape[-2] == 0:
                return None
            self._move()
        keys_of, values_of, key_strides, value_strides = self._places
        return KVRows(keys_of, values_of, key_strides, value_strides, [self._first] * rows, [self._end + 1] * rows)

    def advance(self) -> None:
        """The next position of every sequence was written."""
        self._end += 1
        self._first = max(self._first, self._end - (self.sliding_window - 1))
        self.cumulative_length += 1
        self._show()

    def reset(self) -> None:
        self._buffers, self._places = {}, ()
        super().reset()

    def _show(self) -> None:
        kept = self._end - self._first
        self.keys, self.values = (self._buffers[name].narrow(-2, self._first, kept) for name in ("keys", "values"))

    def _is_in_buffers(self) -> bool:
        buffer = self._buffers.get("keys")
        if buffer is None or self.keys.stride() != buffer.stride():
            return False
        return self.keys.data_ptr() == buffer.data_ptr() + self._first * buffer.stride(-2) * buffer.element_size()

    def _move(self) -> None:
        """What is kept goes to the beginning of the buffers."""
        kept = min(self.keys.shape[-2], self.sliding_window - 1)
        for name, held in (("keys", self.keys), ("values", self.values)):
            shape = (*held.shape[:-2], self._room, held.shape[-1])
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != shape or buffer.dtype != held.dtype:
                with torch.inference_mode(False):  # so that a later call outside inference mode may write to it
                    buffer = torch.empty(shape, dtype=held.dtype)
            source = held.narrow(-2, held.shape[-2] - kept, kept)
            buffer.narrow(-2, 0, kept).copy_(source.clone() if held.data_ptr() == buffer.data_ptr() else source)
            self._buffers[name] = buffer
        keys, values = self._buffers["keys"], self._buffers["values"]
        self._places = _rows_of(keys), _rows_of(values), keys.stride()[1:3], values.stride()[1:3]
        self._first, self._end = 0, kept
        self._show()


def _rows_of(buffer: torch.Tensor) -> list[int]:
    """The address of each sequence's first head and position."""
    step = buffer.stride(0) * buffer.element_size()
    return [buffer.data_ptr() + row * step for row in range(buffer.shape[0])]


def _starts(buffer: torch.Tensor, view: torch.Tensor | None) -> bool:
    """Whether `view` is the first tokens of `buffer`."""
    return view is not None and view.data_ptr() == buffer.data_ptr() and view.stride() == buffer.stride()
