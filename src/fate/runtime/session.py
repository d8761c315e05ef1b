"""`model.fate`: the running engine behind one loaded model, its statistics, and the model class that carries it."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from fate.core import Envelope, StepStats
from fate.errors import ClosedError, EmptyPromptError, EnvelopeError
from fate.memory import MemoryPlan
from fate.runtime.backend import LayerRuntime
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
        capacities: tuple[int, ...],
        manager: ExpertManager,
        pool: SlotPool,
        layers: list[LayerRuntime],
    ) -> None:
        self.system = system
        self.plan = plan
        self.capacities = capacities
        self.closed = False
        self.generate_lock = threading.RLock()
        self._manager = manager
        self._pool = pool
        self._layers = layers
        self._phases = {"prefill": StepStats(), "decode": StepStats()}
        self._forward: tuple[str, int, float, StepStats] | None = None
        self._finalizer = weakref.finalize(self, _shut_down, manager, pool)

    @property
    def envelope(self) -> Envelope:
        return self.plan.envelope

    def stats(self) -> RunStats:
        """What happened so far; subtract two to get what happened between them."""
        return RunStats(replace(self._phases["prefill"]), replace(self._phases["decode"]))

    def close(self) -> None:
        """Stop the transfer threads, free the slots. The model raises ClosedError from then on."""
        if self.closed:
            return
        self.closed = True
        for layer in self._layers:
            layer.closed = True
        self._finalizer()

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
        phase = "decode" if tokens == 1 and past else "prefill"
        self._forward = (phase, batch * tokens, time.perf_counter(), self._manager.snapshot())

    def after_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the model: close the step's account."""
        if self._forward is None:
            return
        phase, tokens, start, before = self._forward
        self._forward = None
        step = self._manager.snapshot() - before
        step.tokens, step.forwards, step.total_s = tokens, 1, time.perf_counter() - start
        self._phases[phase] = self._phases[phase] + step


def _shut_down(manager: ExpertManager, pool: SlotPool) -> None:
    manager.scheduler.close()
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


def attach(model: PreTrainedModel, session: Session) -> None:
    """Give `model` its session: a subclass of the same name, since a model may not be monkeypatched."""
    cls: Any = type(model)
    body = {"generate": _generate_within_plan(cls.generate), "__module__": cls.__module__, "__doc__": cls.__doc__}
    model.__class__ = type(cls.__name__, (FateModel, cls), body)
    object.__setattr__(model, "fate", session)
    model.register_forward_pre_hook(session.before_forward, with_kwargs=True)
    model.register_forward_hook(session.after_forward, with_kwargs=True)


def _generate_within_plan(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate`, one call at a time, refused where it could leave the envelope, its prompt in chunks."""

    @functools.wraps(generate)
    def wrapped(self: Any, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        session: Session = self.fate
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is not None and ids.ndim == 2:
            limit = _generation_limit(self, ids.shape[1], args[0] if args else None, kwargs)
            check_envelope(session.envelope, batch=ids.shape[0], tokens=min(ids.shape[1], 1), context=limit)
            if ids.shape[1] > session.envelope.prefill_chunk:
                kwargs.setdefault("prefill_chunk_size", session.envelope.prefill_chunk)
        with session.generate_lock:
            return generate(self, inputs, *args, **kwargs)

    return wrapped


def _generation_limit(model: Any, prompt: int, config: Any, kwargs: dict[str, Any]) -> int:
    """The most tokens, prompt included, a call of `generate` may reach."""
    config = kwargs.get("generation_config", config) or model.generation_config
    new = kwargs.get("max_new_tokens", None if "max_length" in kwargs else config.max_new_tokens)
    if new is not None:
        return prompt + new
    length = kwargs.get("max_length", config.max_length)
    return max(prompt + 1, length if length is not None else prompt + 20)
