"""What `fate run` and `fate chat` share: how a token is picked, a streamer that keeps time, how an answer went.

It imports torch: commands import it once their arguments are known to be right.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedTokenizerBase, TextStreamer

from fate.engine.session import FateModel, RunStats
from fate.errors import FateError, UsageError
from fate.units import format_bytes


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked. temperature 0: the likeliest; top_k 0: among all."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float

    def arguments(self) -> dict[str, Any]:
        """For transformers' `generate`."""
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
            **(sampled if self.temperature > 0 else {}),
        }


@dataclass(frozen=True)
class Generation:
    """How one answer went, or several. `reused_tokens` of the prompt's were in the KV cache already; `decode_tokens`
    are the new ones after an answer's first, made in `decode_s`; ttft_s is None where no token came. notes: what the
    engine decided meanwhile, by measurement."""

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    decode_tokens: int
    ttft_s: float | None
    decode_s: float
    stats: RunStats
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self.decode_tokens / self.decode_s if self.decode_s else None

    @property
    def bytes_per_token(self) -> float:
        decode = self.stats.decode
        return decode.bytes_moved / decode.tokens if decode.tokens else 0.0


def total(generations: Sequence[Generation], stats: RunStats) -> Generation:
    """Several answers as one; `stats`: of all of them."""
    return Generation(
        prompt_tokens=sum(one.prompt_tokens for one in generations),
        reused_tokens=sum(one.reused_tokens for one in generations),
        new_tokens=sum(one.new_tokens for one in generations),
        decode_tokens=sum(one.decode_tokens for one in generations),
        ttft_s=None,
        decode_s=sum(one.decode_s for one in generations),
        stats=stats,
        notes=tuple(note for one in generations for note in one.notes),
    )


class TimedStreamer(TextStreamer):
    """Prints text as it comes; keeps each new token and when it came. strip_start: no white space before the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, strip_start: bool = False) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._stripping = strip_start

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            self.tokens += value.reshape(-1).tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._stripping:
            text = text.lstrip()
            self._stripping = not text
        super().on_finalized_text(text, stream_end)


def generate(
    model: FateModel,
    ids: torch.Tensor,
    streamer: TimedStreamer,
    sampling: Sampling,
    *,
    max_new_tokens: int | None = None,
    cache: Cache | None = None,
) -> Generation:
    """Continue `ids` [1, tokens] through `streamer`; `cache` holds the keys and values of the first of them.

    Ctrl-C ends it early (`interrupted`); a FateError passes through. Either way what is printed next begins on a line
    of its own. What the engine has to say of itself is not printed into the text: it is in `notes`.
    """
    tokenizer = streamer.tokenizer
    before, notes_before, start = model.fate.stats(), len(model.fate.notes), time.perf_counter()
    reused = cache.get_seq_length() if cache is not None else 0
    interrupted = False
    try:
        with _silent_engine():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                streamer=streamer,
                max_new_tokens=max_new_tokens or sampling.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **sampling.arguments(),
            )
    except KeyboardInterrupt:
        interrupted = True
        streamer.end()
    except FateError:
        streamer.end()
        raise
    times = streamer.times
    return Generation(
        prompt_tokens=ids.shape[1],
        reused_tokens=reused,
        new_tokens=len(times),
        decode_tokens=max(len(times) - 1, 0),
        ttft_s=times[0] - start if times else None,
        decode_s=times[-1] - times[0] if times else 0.0,
        stats=model.fate.stats() - before,
        notes=tuple(model.fate.notes[notes_before:]),
        interrupted=interrupted,
    )


@contextmanager
def _silent_engine() -> Iterator[None]:
    """A line of the engine's log would stand in the middle of the streamed text."""
    log = logging.getLogger("fate.engine")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], without: str) -> list[int]:
    """Token ids of `messages` in the model's chat template, ready for the answer; `without`: what to do where there
    is none. Raises UsageError for that, and for messages that the template refuses."""
    if tokenizer.chat_template is None:
        raise UsageError(f"this model has no chat template: {without}")
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # a template is a program of the model's makers: it may raise anything
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        reason = str(error).strip() or type(error).__name__
        raise UsageError(f"the model's chat template refuses messages of {roles} ({reason}): {without}") from error
    return list(encoded["input_ids"])


def report(model: FateModel, generation: Generation) -> dict[str, Any]:
    """JSON-ready figures of one answer and of what it ran in."""
    decode = generation.stats.decode
    return {
        "system": model.fate.system.name,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": generation.new_tokens,
        "ttft_s": generation.ttft_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
        "hit_rate": decode.hit_rate,
        "coverage": decode.coverage,
        "bytes_per_token": generation.bytes_per_token,
        "wasted_bytes_per_token": decode.wasted_bytes / decode.tokens if decode.tokens else 0.0,
        "stall_share": decode.stall_share,
        "notes": list(generation.notes),
        "slots": model.fate.plan.num_slots,
        "experts": model.fate.plan.needs.total_experts,
        "planned_bytes": model.fate.plan.total,
    }


def summary(generation: Generation) -> str:
    """One line for people."""
    if generation.ttft_s is None:
        return "no token was generated"
    rate, decode = generation.decode_tokens_per_s, generation.stats.decode
    return (
        f"{generation.prompt_tokens} + {generation.new_tokens} tokens · TTFT {generation.ttft_s:.2f} s · "
        f"{f'{rate:.1f} tok/s' if rate else 'one token'} · hit rate {decode.hit_rate:.1%} · "
        f"{format_bytes(generation.bytes_per_token)}/token read · stall {decode.stall_share:.1%}"
    )
