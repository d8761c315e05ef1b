"""`model.fate`: the running engine behind one loaded model, its statistics, and the model class that carries it."""

from __future__ import annotations

import copy
import functools
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from fate.core import Envelope, StepStats
from fate.errors import ClosedError, EmptyPromptError, EnvelopeError, UsageError
from fate.memory import MemoryPlan
from fate.runtime.kv_cache import planned_cache
from fate.runtime.manager import ExpertManager
from fate.runtime.slots import SlotPool
from fate.systems import System


@dataclass(frozen=True)
class RunStats:
    """Counters since loading (or since a snapshot, by subtraction), split by phase: a decode forward has one token
    per sequence."""

    prefill: StepStats
    decode: StepStats

    @property
    def total(self) -> StepStats:
        return self.prefill + self.decode

    def __sub__(self, other: RunStats) -> RunStats:
        return RunStats(self.prefill - other.prefill, self.decode - other.decode)


class Session:
    """Owns slots, transfer threads and hooks of one model. `close` gives everything back and may be called twice."""

    def __init__(
        self,
        system: System,
        plan: MemoryPlan,
        manager: ExpertManager,
        pool: SlotPool,
    ) -> None:
        self.system = system
        self.plan = plan
        self.generate_lock = threading.RLock()
        self._manager = manager
        self._phases = {"prefill": StepStats(), "decode": StepStats()}
        self._step = threading.local()  # the forward under way in this thread
        self._finalizer = weakref.finalize(self, _shut_down, manager, pool)

    @property
    def envelope(self) -> Envelope:
        return self.plan.envelope

    def stats(self) -> RunStats:
        """What happened so far; subtract two to get what happened between them."""
        return RunStats(replace(self._phases["prefill"]), replace(self._phases["decode"]))

    def close(self) -> None:
        """Stop the transfer threads, free the slots. The model raises ClosedError from then on."""
        with self._manager.lock:  # not under a forward of another thread
            self._finalizer()

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def new_cache(self, config: PreTrainedConfig) -> DynamicCache:
        """An empty KV cache whose memory is the plan's: see `runtime.kv_cache`."""
        return planned_cache(config, self.envelope.max_context)

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: refuse what the plan does not cover, start the step's clock."""
        if self.closed:
            raise ClosedError()
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            ids = kwargs.get("inputs_embeds")
        if not isinstance(ids, torch.Tensor):
            return
        batch, tokens = ids.shape[0], ids.shape[1]
        cache: Any = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        keep = kwargs.get("logits_to_keep", 0)
        rows = len(keep) if isinstance(keep, torch.Tensor) else keep or tokens
        check_envelope(self.envelope, batch=batch, tokens=tokens, context=int(past) + tokens, logit_rows=batch * rows)
        self._close_account()  # of a forward that raised
        phase = "decode" if tokens == 1 and past else "prefill"
        self._step.account = (phase, batch * tokens, time.perf_counter(), self._manager.snapshot())

    def after_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the model: close the step's account."""
        self._close_account()

    def _close_account(self) -> None:
        account = getattr(self._step, "account", None)
        if account is None:
            return
        self._step.account = None
        phase, tokens, start, before = account
        step = self._manager.snapshot() - before
        step.tokens, step.forwards, step.total_s = tokens, 1, time.perf_counter() - start
        self._phases[phase] = self._phases[phase] + step


def _shut_down(manager: ExpertManager, pool: SlotPool) -> None:
    try:
        manager.close()
    finally:
        pool.close()


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


if TYPE_CHECKING:
    _Base = PreTrainedModel
else:  # a loaded model's class derives from its own family's
    _Base = object


class FateModel(_Base):
    """What a loaded model has over its transformers class: `fate`, a `generate` that keeps the plan, `with`."""

    fate: Session
    generate: Callable[..., Any]

    def __enter__(self) -> FateModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.fate.close()

    def to(self, *args: Any, **kwargs: Any) -> FateModel:  # type: ignore[override]
        """Only what changes nothing: packed weights and slots stay where the plan put them."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device not in (None, self.device) or dtype not in (None, self.dtype):
            raise UsageError(
                f"a model loaded by fate stays on {self.device} in {self.dtype}: load it with another store"
            )
        return self

    def cuda(self, *args: Any, **kwargs: Any) -> FateModel:  # type: ignore[override]
        return self.to("cuda")


def attach(model: PreTrainedModel, session: Session) -> None:
    """Give `model` its session: a subclass of the same name, since a model may not be monkeypatched."""
    cls: Any = type(model)
    body = {"generate": _generate_within_plan(cls.generate), "__module__": cls.__module__, "__doc__": cls.__doc__}
    model.__class__ = type(cls.__name__, (FateModel, cls), body)
    object.__setattr__(model, "fate", session)
    object.__setattr__(model, "hf_device_map", {"": "cpu"})  # a pipeline must not move it to an accelerator
    model.register_forward_pre_hook(session.before_forward, with_kwargs=True)
    model.register_forward_hook(session.after_forward, with_kwargs=True)


def _generate_within_plan(generate: Callable[..., Any]) -> Callable[..., Any]:
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
        request.check_chunks(session.envelope)
        if config is None:
            kwargs["prefill_chunk_size"] = chunk
        else:
            kwargs["generation_config"] = copy.deepcopy(config)
            kwargs["generation_config"].prefill_chunk_size = chunk
    growing = model._supports_default_dynamic_cache() and not model.config.is_encoder_decoder
    if growing and request.plain_cache and kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = session.new_cache(model.config)


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

    def check(self, envelope: Envelope) -> None:
        kept = self.options.get("output_scores") or self.options.get("output_logits")
        rows = self.batch * (self.limit - self.tokens) if kept else 0
        check_envelope(envelope, batch=self.batch, tokens=min(self.tokens, 1), context=self.limit, logit_rows=rows)

    def check_chunks(self, envelope: Envelope) -> None:
        """A prompt longer than a forward may be is split, which some ways of generating do not allow."""
        if self._assisted or self.options.get("use_cache", True) is False:
            raise EnvelopeError(
                f"a prompt of {self.tokens} tokens goes through the model in chunks of {envelope.prefill_chunk}, which "
                f"assisted generation and use_cache=False do not allow: load with prefill_chunk={self.tokens}"
            )
