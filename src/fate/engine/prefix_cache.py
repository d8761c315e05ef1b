"""The KV cache of one conversation, carried from call to call of `generate`: what two prompts begin with is computed
once.

>>> prefix = PrefixCache(model)
>>> model.generate(first, past_key_values=prefix.cache_for(first[0].tolist()))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fate.engine.session import FateModel
from fate.models.kv_cache import PlannedLayer, PlannedSlidingLayer

_CUT = (DynamicLayer, PlannedLayer)  # hold every token, so they can be cut back to any
# They take several new tokens after old ones, as chunked prefill does.
GO_ON = (*_CUT, DynamicSlidingWindowLayer, PlannedSlidingLayer)


class PrefixCache:
    """At most one cache, whose memory is the plan's. Of layers with a state that is not a list of tokens (linear
    attention, convolutions) nothing is reused."""

    def __init__(self, model: FateModel) -> None:
        self._model = model
        self._cache: DynamicCache | None = None
        self._tokens: list[int] = []  # what every layer of the cache holds

    def cache_for(self, tokens: Sequence[int]) -> DynamicCache:
        """A cache of as many first tokens as are known, for `generate` over all of `tokens`; call `keep` after it."""
        known = _common(self._tokens, tokens[:-1])  # the last must go through the model: its logits are wanted
        if self._cache is None or not known or not _cut(self._cache, known):
            self._cache = None  # first, so that there are never two
            self._cache = self._model.fate.new_cache(self._model.config)
            known = 0
        self._tokens = list(tokens[:known])
        return self._cache

    def keep(self, tokens: Sequence[int]) -> None:
        """The cache was fed `tokens` in order, as far as it came: an interrupted forward reaches only some layers."""
        layers: list[Any] = self._cache.layers if self._cache is not None else []
        if layers and all(type(layer) in GO_ON for layer in layers):
            self._tokens = list(tokens[: min(int(layer.get_seq_length()) for layer in layers)])
        else:
            self._tokens = []


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first elements are the same."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _cut(cache: DynamicCache, tokens: int) -> bool:
    """Leave the first `tokens` in every layer; False, some layers cut already, where one has forgotten too much."""
    layers: list[Any] = cache.layers
    for layer in layers:
        extra = int(layer.get_seq_length()) - tokens
        if not extra:
            continue  # a sliding window's `crop(0)` is an error
        if type(layer) not in _CUT:
            return False
        layer.crop(-extra)
    return True
