"""Generation within the memory plan: what it does not cover is refused before anything is allocated, a long prompt goes
through in chunks, and the KV cache is the planned one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fate.core import Envelope
from fate.errors import ClosedError, EmptyPromptError, EnvelopeError

if TYPE_CHECKING:
    from fate.engine.session import Session


def check_envelope(envelope: Envelope, *, batch: int, tokens: int, context: int, logit_rows: int = 0) -> None:
    """Raise EnvelopeError, before anything is allocated, for a forward the memory plan does not cover."""
    if batch < 1 or tokens < 1:
        raise EmptyPromptError()
    if batch > envelope.max_batch:
        raise EnvelopeError(
            f"a batch of {batch} sequences is beyond the plan's {envelope.max_batch}: load with max_batch={batch}"
        )
    if context > envelope.max_context:
        raise EnvelopeError(
            f"{context} tokens of prompt and generation are beyond the plan's context of {envelope.max_context}: "
            f"shorten them or load with max_context={context} (--max-context {context})"
        )
    if tokens > envelope.prefill_chunk:
        raise EnvelopeError(
            f"one forward of {tokens} tokens is beyond the plan's chunk of {envelope.prefill_chunk}: use generate, "
            f"which splits the prompt, or load with prefill_chunk={tokens}"
        )
    if logit_rows > envelope.logit_rows:
        raise EnvelopeError(
            f"{logit_rows} rows of logits are beyond the plan's {envelope.logit_rows}: pass logits_to_keep or load "
            f"with logit_rows={logit_rows}"
        )


def generate_within_plan(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate`, one call at a time, refused where it could leave the envelope, its prompt in chunks."""

    @functools.wraps(generate)
    def wrapped(self: Any, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        session: Session = self.fate
        if session.closed:
            raise ClosedError()
        if args:  # generation_config came by position
            kwargs["generation_config"], args = args[0], args[1:]
        given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        prompt = next((tensor for tensor in given if isinstance(tensor, torch.Tensor)), None)
        if prompt is not None:
            _plan_call(self, prompt.shape[0], prompt.shape[1], kwargs)
        with session.generate_lock:
            return generate(self, inputs, kwargs.pop("generation_config", None), *args, **kwargs)

    return wrapped


def _plan_call(model: Any, batch: int, tokens: int, kwargs: dict[str, Any]) -> None:
    """Check a call of `generate` against the plan, and add to `kwargs` the prompt's chunks and the planned cache."""
    session: Session = model.fate
    chunk = session.envelope.prefill_chunk
    config = kwargs.get("generation_config")
    request = _Request(batch, tokens, {**_set_values(config or model.generation_config), **kwargs})
    request.check(session.envelope)
    if tokens > chunk:
        if model.config.is_encoder_decoder:  # an encoder sees its input whole
            check_envelope(session.envelope, batch=batch, tokens=tokens, context=tokens)
        request.check_chunks(session.envelope)
        if config is None:
            kwargs["prefill_chunk_size"] = chunk
        else:
            kwargs["generation_config"] = copy.deepcopy(config)
            kwargs["generation_config"].prefill_chunk_size = chunk
    if _takes_growing_cache(model) and request.plain_cache and kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = session.new_cache(model.config)


def _takes_growing_cache(model: Any) -> bool:
    """Whether `generate` would make a DynamicCache; a diffusion model's generation is of another kind."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    return supports is not None and supports() and not model.config.is_encoder_decoder


def _set_values(config: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(config).items() if value is not None}


@dataclass(frozen=True)
class _Request:
    """What a call of `generate` asks for: prompt [batch, tokens], and its options by name."""

    batch: int
    tokens: int
    options: dict[str, Any]

    @property
    def limit(self) -> int:
        """The most tokens, prompt included, that one sequence may reach."""
        if (new := self.options.get("max_new_tokens")) is not None:
            return self.tokens + int(new)
        return max(self.tokens + 1, int(self.options.get("max_length", self.tokens + 20)))

    @property
    def plain_cache(self) -> bool:
        """Whether transformers would make an ordinary growing cache."""
        named = self.options.get("cache_implementation") not in (None, "dynamic")
        return self.options.get("use_cache", True) is not False and not named and not self._assisted

    @property
    def _assisted(self) -> bool:
        return any(self.options.get(name) for name in ("assistant_model", "prompt_lookup_num_tokens"))

    @property
    def sequences(self) -> int:
        """What one forward is given: each prompt as often as there are beams or answers to it."""
        times = max(int(self.options.get(name) or 1) for name in ("num_beams", "num_return_sequences"))
        return self.batch * times

    def check(self, envelope: Envelope) -> None:
        kept = self.options.get("output_scores") or self.options.get("output_logits")
        rows = self.sequences * (self.limit - self.tokens) if kept else 0
        tokens = min(self.tokens, 1)
        check_envelope(envelope, batch=self.sequences, tokens=tokens, context=self.limit, logit_rows=rows)

    def check_chunks(self, envelope: Envelope) -> None:
        """A prompt longer than a forward may be is split, which some ways of generating do not allow."""
        if self._assisted or self.options.get("use_cache", True) is False:
            raise EnvelopeError(
                f"a prompt of {self.tokens} tokens goes through the model in chunks of {envelope.prefill_chunk}, which "
                f"assisted generation and use_cache=False do not allow: load with prefill_chunk={self.tokens}"
            )
