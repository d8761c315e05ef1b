"""What one process measures of one engine: the same steps for Fate and for its peer. Standard library only.

A job is JSON: {"ids", "launch_tokens", "prefills", "prompt_tokens", "settle_tokens", "decode_tokens", "threads",
"started", "logits"} beside what the engine itself wants. `started` is `time.monotonic()` when the process was asked
for; `logits` a file for the logits of the prompt's positions, or null.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol


class Engine(Protocol):
    """A loaded model with an empty context."""

    def reset(self) -> None:
        """Forget all tokens."""

    def set_threads(self, threads: int) -> None: ...

    def feed(self, ids: Sequence[int]) -> None:
        """Append tokens and wait for the logits of the last one."""

    def write_logits(self, ids: Sequence[int], path: str) -> None:
        """From an empty context: float32 [tokens, vocabulary] as a .npy file."""

    def counters(self) -> dict[str, float]:
        """What the engine counts, since it was loaded."""


def measure(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """{"launch_s", "prefill": {tokens: {threads: tokens/s}}, "decode": {threads: tokens/s}, "counters"}."""
    ids = job["ids"]
    engine.set_threads(job["threads"][0])
    engine.feed(ids[: job["launch_tokens"]])
    found: dict[str, Any] = {"launch_s": time.monotonic() - job["started"], "prefill": {}, "decode": {}}
    if job["logits"]:
        engine.reset()
        engine.write_logits(ids[: job["prompt_tokens"]], job["logits"])
    if job["prefills"]:
        engine.reset()
        engine.feed(ids[: max(job["prefills"])])  # touches every weight
    for tokens in job["prefills"]:
        found["prefill"][str(tokens)] = {str(t): _prefill(engine, ids[:tokens], t) for t in job["threads"]}
    for threads in job["threads"]:
        speed, counted = _decode(engine, job, threads)
        found["decode"][str(threads)] = speed
        found["counters"] = counted
    return found


def _prefill(engine: Engine, ids: Sequence[int], threads: int) -> float:
    engine.set_threads(threads)
    engine.reset()
    start = time.perf_counter()
    engine.feed(ids)
    return len(ids) / (time.perf_counter() - start)


def _decode(engine: Engine, job: dict[str, Any], threads: int) -> tuple[float, dict[str, float]]:
    """tokens/s after the prompt and some tokens to settle, and what was counted in that time."""
    engine.set_threads(threads)
    engine.reset()
    first = job["prompt_tokens"] + job["settle_tokens"]
    timed = job["ids"][first : first + job["decode_tokens"]]
    engine.feed(job["ids"][: job["prompt_tokens"]])
    for token in job["ids"][job["prompt_tokens"] : first]:
        engine.feed([token])
    before = engine.counters()
    start = time.perf_counter()
    for token in timed:
        engine.feed([token])
    seconds = time.perf_counter() - start
    counted = {name: value - before[name] for name, value in engine.counters().items()}
    return len(timed) / seconds, counted
