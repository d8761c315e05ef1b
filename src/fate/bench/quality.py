"""What lossy systems cost: the change of perplexity against an exact run on the same texts.

The texts go through in prompts of the workload's length, each in chunks as a prefill has them, because it is in prefill
that precision is saved. A change comes with its standard error, from the differences token by token: what both runs
find hard cancels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from fate.bench.prompts import Encode
from fate.engine.session import FateModel
from fate.errors import UsageError
from fate.tools.evaluate import Evaluation, perplexity


class Quality:
    """texts: token ids [tokens] int64 by name. prompt_tokens: of one window, the first of which is given."""

    def __init__(self, texts: Mapping[str, torch.Tensor], prompt_tokens: int) -> None:
        self._texts = texts
        self._window = prompt_tokens
        self._exact: dict[str, Evaluation] = {}

    def measure_exact(self, model: FateModel) -> None:
        """With an exact system, whichever: they all give the same."""
        self._exact = self._evaluate(model)

    def measure(self, model: FateModel) -> dict[str, Any]:
        """By text, the change against the exact run and its standard error: 0.01 is one per cent more perplexity."""
        return {name: _change(found, self._exact[name]) for name, found in self._evaluate(model).items()}

    def settings(self) -> dict[str, Any]:
        """What is asked: the texts, and how they are cut."""
        digests = {name: hashlib.sha256(str(ids.tolist()).encode()).hexdigest() for name, ids in self._texts.items()}
        return {"window_tokens": self._window, "token_ids_sha256": digests}

    def describe(self) -> dict[str, Any]:
        """The settings and the exact run's, for the JSON."""
        texts = {name: {"tokens": e.tokens, "perplexity": e.perplexity} for name, e in self._exact.items()}
        return {"settings": self.settings(), "exact": texts}

    def _evaluate(self, model: FateModel) -> dict[str, Evaluation]:
        chunk = model.fate.envelope.max_rows_per_forward
        return {name: perplexity(model, ids, window=self._window, chunk=chunk) for name, ids in self._texts.items()}


def _change(found: Evaluation, exact: Evaluation) -> dict[str, float | None]:
    """standard_error: None of a single token."""
    lost = (found.nats - exact.nats).double()
    ratio = math.exp(float(lost.mean()))
    error = ratio * float(lost.std()) / math.sqrt(len(lost)) if len(lost) > 1 else None
    return {"change": ratio - 1, "standard_error": error}


def make_quality(texts: Mapping[str, str], encode: Encode, prompt_tokens: int, max_tokens: int) -> Quality | None:
    """None without texts; raises UsageError for one of less than two tokens."""
    ids = {name: torch.tensor(encode(text)[:max_tokens]) for name, text in texts.items()}
    for name, found in ids.items():
        if len(found) < 2:
            raise UsageError(f"{name} has {len(found)} tokens: perplexity needs at least 2")
    return Quality(ids, prompt_tokens) if ids else None
