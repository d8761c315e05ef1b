"""Perplexity of a loaded model on text, within its memory plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

from fate.engine.session import FateModel
from fate.errors import UsageError


@dataclass(frozen=True)
class Evaluation:
    """nats: negative log-likelihood of each predicted token, float32 [tokens]."""

    nats: torch.Tensor
    seconds: float

    @property
    def tokens(self) -> int:
        return len(self.nats)

    @property
    def nats_per_token(self) -> float:
        return float(self.nats.double().mean())

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def read_text(file: Path) -> str:
    """The file's text; raises UsageError if it is missing, not UTF-8 or empty."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}): give a text file") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not UTF-8 text: give a text file") from None
    if not text.strip():
        raise UsageError(f"{file} has no text: give a text file with some")
    return text


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    ids: torch.Tensor,
    *,
    window: int,
    chunk: int,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of token ids [tokens] in windows of `window` tokens that do not overlap; the first token of a window
    is given, the others are predicted. `chunk` tokens go through the model at a time (1: as decoding does)."""
    if len(ids) < 2 or window < 2:
        raise UsageError(f"{len(ids)} tokens in windows of {window}: perplexity needs at least 2 of each")
    start = time.perf_counter()
    nats: list[torch.Tensor] = []
    for first in range(0, len(ids) - 1, window):
        piece = ids[first : first + window]
        if len(piece) < 2:
            break
        nats += _window_nats(model, piece, chunk)
        if progress is not None:
            progress(first + len(piece), len(ids))
    return Evaluation(torch.cat(nats), time.perf_counter() - start)


def _window_nats(model: PreTrainedModel, ids: torch.Tensor, chunk: int) -> list[torch.Tensor]:
    cache = model.fate.new_cache(model.config) if isinstance(model, FateModel) else DynamicCache(config=model.config)
    found = []
    for at in range(0, len(ids) - 1, chunk):
        given = ids[at : min(at + chunk, len(ids) - 1)]
        logits = model(given[None], past_key_values=cache, use_cache=True).logits[0].float()
        targets = ids[at + 1 : at + 1 + len(given)]
        found.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return found
