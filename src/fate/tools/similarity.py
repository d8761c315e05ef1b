"""What the cross-layer gate has to work with, on a text of the user's: how alike the inputs of adjacent gates are, and
how many of a layer's experts its router names when it is given the previous layer's gate input.

Measured on the model's own forward, through hooks on its routers, so it holds for the text and the precision given.
The method is that of arXiv 2502.12224, section 3: gate inputs of adjacent layers are alike, so the next layer's gate
may be asked ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from fate.engine.session import FateModel
from fate.errors import UsageError
from fate.models.adapter import MoELayer, find_moe_layers


@dataclass(frozen=True)
class LayerSimilarity:
    """One MoE layer, means over tokens; None where there is nothing to say (`note` has the reason).

    cosine_to_next: of this layer's gate input and the next's. recall_at_k: share of the experts this layer used that
    are among the top k when its router is given the previous layer's gate input; recall_at_2k: among its first 2k,
    the others by their logits. load_balance: (token, rank) pairs of the busiest expert over the mean of all experts.
    """

    layer: int
    name: str
    num_experts: int
    top_k: int | None
    cosine_to_next: float | None
    recall_at_k: float | None
    recall_at_2k: float | None
    load_balance: float | None
    note: str


@torch.inference_mode()
def measure_similarity(
    model: FateModel, ids: torch.Tensor, progress: Callable[[int, int], None] | None = None
) -> list[LayerSimilarity]:
    """Feed token ids [tokens] in windows of the plan's context that do not overlap, in chunks that the plan covers.

    Raises UsageError for a text without tokens.
    """
    if len(ids) == 0:
        raise UsageError("the text has no tokens: give a longer text")
    layers = [_Layer(layer) for layer in find_moe_layers(model)]
    window, chunk = model.fate.envelope.max_context, model.fate.envelope.max_rows_per_forward
    done = 0
    with _listening(layers):
        for piece in ids.split(window):
            cache = model.fate.new_cache(model.config)
            for given in piece.split(chunk):
                model(given[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
                done += len(given)
                if progress is not None:
                    progress(done, len(ids))
    return [layer.result() for layer in layers]


@dataclass(eq=False)
class _Layer:
    """One layer's counters. cosine: sum over `tokens` of that with the next layer; found: how many of the `needed`
    (token, expert) pairs were among the first k and 2k, None where the router cannot be asked for so many."""

    moe: MoELayer
    note: str = ""
    top_k: int | None = None
    tokens: int = 0
    cosine: float = 0.0
    needed: int = 0
    found: int = 0
    found_of_twice: int | None = 0
    load: torch.Tensor = field(init=False)  # pairs [num_experts]

    def __post_init__(self) -> None:
        self.load = torch.zeros(self.moe.num_experts, dtype=torch.long)
        if self.moe.router is None:
            self.note = "no router of its own was found"

    def see(self, given: torch.Tensor, previous: torch.Tensor | None, call: _Call) -> None:
        """The router was given `given` [tokens, hidden], and the one before it `previous`."""
        used = _chosen(call.output, self.moe.num_experts)
        if used is None:
            self.note = "its router does not answer with (logits, weights, indices)"
            return
        self.top_k = call.output[2].shape[-1]
        self.load += used.sum(dim=0)
        if previous is None and self.moe.index > 0:
            self.note = "the layer before it has no router of its own"
        if previous is None or self.note:
            return
        answer = call.again(previous)
        first = _chosen(answer, self.moe.num_experts)
        if first is None:
            self.note = "its router cannot be asked ahead: it takes more than the gate input"
            return
        self.needed += int(used.sum())
        self.found += int((used & first).sum())
        twice = _first(answer[0], first, 2 * self.top_k)
        if twice is None or self.found_of_twice is None:
            self.found_of_twice = None
        else:
            self.found_of_twice += int((used & twice).sum())

    def result(self) -> LayerSimilarity:
        pairs = int(self.load.sum())
        twice = self.found_of_twice
        return LayerSimilarity(
            layer=self.moe.index,
            name=self.moe.name,
            num_experts=self.moe.num_experts,
            top_k=self.top_k,
            cosine_to_next=self.cosine / self.tokens if self.tokens else None,
            recall_at_k=self.found / self.needed if self.needed else None,
            recall_at_2k=twice / self.needed if self.needed and twice is not None else None,
            load_balance=int(self.load.max()) * self.moe.num_experts / pairs if pairs else None,
            note=self.note,
        )


@dataclass(frozen=True, eq=False)
class _Call:
    """How the model just called a router, and what it answered: (logits, weights, indices) of most families."""

    router: nn.Module
    ndim: int
    extra: tuple[Any, ...]
    named: dict[str, Any]
    output: Any

    def again(self, gate_input: torch.Tensor) -> Any:
        """The router's answer for another gate_input [tokens, hidden]; None where it depends on more than that."""
        others = (value for value in (*self.extra, *self.named.values()) if isinstance(value, torch.Tensor))
        if any(not isinstance(value, nn.Parameter) for value in others):
            return None
        shaped = gate_input.reshape(*[1] * (self.ndim - 2), *gate_input.shape)
        return type(self.router).forward(self.router, shaped, *self.extra, **self.named)  # no hooks: see models.gate


@contextmanager
def _listening(layers: list[_Layer]) -> Iterator[None]:
    """Hooks that tell each layer what its router sees; layers call in order, so the last to call is the previous."""
    last: list[tuple[_Layer, torch.Tensor]] = []

    def on_router(layer: _Layer, router: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        named = dict(kwargs)
        given = args[0] if args else named.pop("hidden_states")
        flat = given.reshape(-1, given.shape[-1])
        previous = None
        if layer.moe.index > 0 and last and last[0][0].moe.index == layer.moe.index - 1:
            before, previous = last[0]
            before.tokens += len(flat)
            before.cosine += float(torch.cosine_similarity(previous.float(), flat.float(), dim=-1).sum())
        last[:] = [(layer, flat)]
        layer.see(flat, previous, _Call(router, given.ndim, args[1:], named, output))

    hooks = [
        layer.moe.router.register_forward_hook(partial(on_router, layer), with_kwargs=True)
        for layer in layers
        if layer.moe.router is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _chosen(answer: Any, num_experts: int) -> torch.Tensor | None:
    """bool [tokens, num_experts]: what a router's answer sends each token to; None for an answer of another form."""
    if not isinstance(answer, tuple) or len(answer) != 3 or answer[1].numel() != answer[2].numel():
        return None
    weights, indices = (part.reshape(-1, answer[2].shape[-1]) for part in answer[1:])
    dropped = indices.masked_fill(weights == 0, num_experts)  # and some families have that index for "none"
    return torch.zeros(len(indices), num_experts + 1, dtype=torch.bool).scatter_(1, dropped, True)[:, :num_experts]


def _first(logits: torch.Tensor, chosen: torch.Tensor, count: int) -> torch.Tensor | None:
    """bool [tokens, num_experts]: the chosen, then the others by their logits; None where logits are no scores of
    experts."""
    if logits.numel() != chosen.numel():
        return None
    ranked = logits.reshape(chosen.shape).float().masked_fill(chosen, torch.inf)
    order = ranked.topk(min(count, chosen.shape[1]), dim=-1).indices
    return torch.zeros_like(chosen).scatter_(1, order, True)
