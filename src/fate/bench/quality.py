"""What lossy systems cost: the change of perplexity against an exact run on the same texts.

The texts go through in prompts of the workload's length, each in chunks as a prefill has them, because it is in prefill
that precision is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fate.bench.prompts import Encode
from fate.errors import UsageError
from fate.evaluate import Evaluation, perplexity
from fate.runtime.session import FateModel


class Quality:
    """texts: token ids [tokens] int64 by name. prompt_tokens: of one window, the first of which is given."""

    def __init__(self, texts: Mapping[str, torch.Tensor], prompt_tokens: int) -> None:
        self._texts = texts
        self._window = prompt_tokens
        self._exact: dict[str, Evaluation] = {}

    def measure_exact(self, model: FateModel) -> None:
        """With an exact system, whichever: they all give the same."""
        self._exact = self._evaluate(model)

    def measure(self, model: FateModel) -> dict[str, float]:
        """By text, the change against the exact run: 0.01 is one per cent more perplexity."""
        found = self._evaluate(model)
        return {name: found[name].perplexity / self._exact[name].perplexity - 1 for name in found}

    def describe(self) -> dict[str, Any]:
        """The exact run's, for the JSON."""
        texts = {name: {"tokens": e.tokens, "perplexity": e.perplexity} for name, e in self._exact.items()}
        return {"window_tokens": self._window, "exact": texts}

    def _evaluate(self, model: FateModel) -> dict[str, Evaluation]:
        chunk = model.fate.envelope.max_rows_per_forward
        return {name: perplexity(model, ids, window=self._window, chunk=chunk) for name, ids in self._texts.items()}


def make_quality(texts: Mapping[str, str], encode: Encode, prompt_tokens: int, max_tokens: int) -> Quality | None:
    """None without texts; raises UsageError for one of less than two tokens."""
    ids = {name: torch.tensor(encode(text)[:max_tokens]) for name, text in texts.items()}
    for name, found in ids.items():
        if len(found) < 2:
            raise UsageError(f"{name} has {len(found)} tokens: perplexity needs at least 2")
    return Quality(ids, prompt_tokens) if ids else None
