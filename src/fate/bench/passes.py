"""One timed request: a prompt prefilled in chunks, then given tokens decoded one by one.

The tokens are given, not generated: every system sees the same ones whatever it computes, and random weights, which
decode greedily into one token for ever, do not flatter a cache.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache

from fate.engine.session import FateModel, RunStats


@dataclass(frozen=True)
class Pass:
    """Seconds are wall clock: `ttft_s` to the first token's logits, `decode_s` for the `new_tokens` that follow."""

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_s: float
    stats: RunStats


@torch.inference_mode()
def feed(model: FateModel, ids: torch.Tensor, prompt_tokens: int) -> Pass:
    """Run `ids` [1, tokens] through `model` from an empty KV cache: `prompt_tokens` prefilled, the others decoded."""
    cache = model.fate.new_cache(model.config)
    before = model.fate.stats()
    start = time.perf_counter()
    _prefill(model, cache, ids[:, :prompt_tokens])
    first_token = time.perf_counter()
    _decode(model, cache, ids[:, prompt_tokens:])
    end = time.perf_counter()
    new_tokens = ids.shape[1] - prompt_tokens
    return Pass(prompt_tokens, new_tokens, first_token - start, end - first_token, model.fate.stats() - before)


@torch.inference_mode()
def trace_last_token(model: FateModel, ids: torch.Tensor, prompt_tokens: int) -> dict[str, Any]:
    """What `feed` does, noting when everything happened while the last token is decoded.

    Returns {"seconds", "events"}: the fields of `fate.trace.timeline.Event`, seconds counted from the token's start.
    """
    cache = model.fate.new_cache(model.config)
    _prefill(model, cache, ids[:, :prompt_tokens])
    _decode(model, cache, ids[:, prompt_tokens:-1])
    with model.fate.record() as timeline:
        start = time.perf_counter()
        _decode(model, cache, ids[:, -1:])
        end = time.perf_counter()
    events = [asdict(event) for event in timeline.events]
    for event in events:
        event["start_s"] -= start
        event["end_s"] -= start
    return {"seconds": end - start, "events": events}


def _prefill(model: FateModel, cache: DynamicCache, ids: torch.Tensor) -> None:
    for piece in ids.split(model.fate.envelope.prefill_chunk, dim=1):
        model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _decode(model: FateModel, cache: DynamicCache, ids: torch.Tensor) -> None:
    for token in ids.split(1, dim=1):
        model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
