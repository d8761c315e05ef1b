"""Fate in a process of its own: `python fate_worker.py JOB`. The last line of output is the result."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from measurement import measure  # beside this script

from fate.bench.environment import peak_resident_bytes
from fate.load import load


class FateEngine:
    """See `measurement.Engine`."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"][0])
        rows = job["prompt_tokens"] if job["logits"] else None
        self._model = load(
            job["model"],
            memory=job["memory"],
            system=job["system"],
            max_context=job["max_context"],
            logit_rows=rows,
            on_plan=lambda *_: None,
        )
        self.reset()

    def reset(self) -> None:
        self._cache = self._model.fate.new_cache(self._model.config)

    def set_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> None:
        for piece in torch.tensor([list(ids)]).split(self._model.fate.envelope.prefill_chunk, dim=1):
            self._model(piece, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def write_logits(self, ids: Sequence[int], path: str) -> None:
        logits = self._model(torch.tensor([list(ids)]), past_key_values=self._cache, use_cache=True).logits[0]
        np.save(path, logits.float().numpy())

    def counters(self) -> dict[str, float]:
        stats = self._model.fate.stats().decode
        return {
            "tokens": stats.tokens,
            "hits": stats.hits,
            "misses": stats.misses,
            "bytes_moved": stats.bytes_moved,
            "stall_s": stats.stall_s,
        }

    def plan(self) -> dict[str, int]:
        plan = self._model.fate.plan
        return {"planned_bytes": plan.total, "slots": plan.num_slots, "experts": plan.needs.total_experts}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    engine = FateEngine(given)
    result = measure(engine, given)
    print(json.dumps({**result, **engine.plan(), "peak_resident_bytes": peak_resident_bytes()}))
