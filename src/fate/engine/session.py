"""`model.fate`: the running engine behind one loaded model, its statistics, and the model class that carries it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from fate.core import Envelope, Span, StepStats
from fate.engine.engine import Engine
from fate.engine.generation import check_envelope, generate_within_plan
from fate.engine.step import PhaseTimes
from fate.errors import ClosedError, ProfileMissingError, UsageError
from fate.kernels import native, threads
from fate.models.attention import follow
from fate.models.kv_cache import plan_layers, planned_cache
from fate.plan.budget import MemoryPlan, make_plan
from fate.plan.profile import Profile
from fate.store.reader import StoreReader
from fate.systems import System, resolve_system
from fate.trace import Recorder, Timeline, TraceMeta
from fate.trace.observer import Observer
from fate.units import parse_experts, parse_link, parse_memory

if TYPE_CHECKING:
    from fate.engine.assembly import Assembly


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
    """Owns the engine behind one model. `close` gives everything back and may be called twice."""

    def __init__(self, assembly: Assembly, engine: Engine, link: float | None) -> None:
        self.generate_lock = threading.RLock()
        self._assembly = assembly
        self._link = link
        self._packed = not assembly.reader.header.is_raw
        self._engine = [engine]  # a holder: the finalizer must not hold the session
        self._finalizer = weakref.finalize(self, _shut_down, self._engine, assembly.reader)

    @property
    def engine(self) -> Engine:
        return self._engine[0]

    @property
    def system(self) -> System:
        return self.engine.system

    @property
    def plan(self) -> MemoryPlan:
        return self.engine.plan

    @property
    def envelope(self) -> Envelope:
        return self.plan.envelope

    @property
    def notes(self) -> list[str]:
        """What the engine decided by measurement, such as to prefetch no longer; one line each."""
        return list(self.engine.notes)

    def stats(self) -> RunStats:
        """What this engine did so far; subtract two to get what happened between them."""
        return RunStats(self._total(True), self._total(False))

    def layer_stats(self) -> list[RunStats]:
        """The same, of each MoE layer; `total_s` is then from routing to sum."""
        accounting = self.engine.accounting
        pairs = zip(accounting.layers(True), accounting.layers(False), strict=True)
        return [RunStats(prefill, decode) for prefill, decode in pairs]

    @contextmanager
    def record(self, timeline: Timeline | None = None) -> Iterator[Timeline]:
        """Note down what happens when, as long as the context is open."""
        timeline = timeline or Timeline()
        with self.engine.accounting.observed_by(timeline):
            yield timeline

    @contextmanager
    def record_routing(self, model_name: str = "") -> Iterator[Recorder]:
        """Note down every layer's routing as a trace, as long as the context is open."""
        counts = tuple(layer.num_experts for layer in self.reader.header.layers)
        recorder = Recorder(TraceMeta(model_name, counts, self._assembly.top_k))
        with self.engine.accounting.observed_by(recorder):
            yield recorder

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Tell `observer` of every layer and read, as long as the context is open."""
        with self.engine.accounting.observed_by(observer):
            yield

    @property
    def native(self) -> str:
        """What of a decoded token's layer is native: "layer", "block", "experts" or "" (see `models/decode`)."""
        return "" if self._assembly.native is None else self._assembly.native.kind

    def refresh(self) -> None:
        """Read weights and settings of the model again.

        Needed only after a change that went past attributes, hooks and tensors' memory, such as a write to a module's
        `__dict__`. Other changes are seen when the next forward begins.
        """
        if self._assembly.native is not None:
            self._assembly.native.refresh()

    def stop_at_next_layer(self, stop: bool = True) -> None:
        """Raise KeyboardInterrupt where the next MoE layer begins, where nothing is under way; False takes it back."""
        self.engine.stop_asked = stop

    def reconfigure(
        self,
        *,
        system: str | System | None = None,
        experts: str | int | float | None = None,
        link: str | float | None = None,
        memory: str | int | None = None,
    ) -> None:
        """Exchange the engine: another system, share of experts, budget or slower tier, on the same dense weights.

        Starts with empty caches and counters. What is None stays as it is, but for experts and link, whose None means
        what it does in `fate.load`. Raises what loading raises; then the session is closed.
        """
        if self.closed:
            raise ClosedError()
        with self.generate_lock:
            old = self.engine
            chosen = resolve_system(system) if system is not None else old.system
            pace = parse_link(link) if link is not None else None
            needs, budget = old.plan.needs, old.plan.budget if memory is None else parse_memory(memory)
            records = self._assembly.reader.header.file_bytes if pace is not None else 0
            needs = replace(needs, records=records)
            plan = make_plan(budget, self.envelope, needs, parse_experts(experts, needs.total_experts))
            if chosen.needs_profile and self._assembly.profile is None:
                raise ProfileMissingError(chosen.name)
            try:
                old.close()
                self._engine[0] = self._assembly.build(chosen, plan, pace)
            except BaseException:
                self.close()
                raise
            self._link = pace
            self._assembly.steps.times = PhaseTimes.zero()

    @property
    def link(self) -> float | None:
        """Bytes per second of the emulated link as configured; None: records come from the disk."""
        return self._link

    @property
    def pace(self) -> float | None:
        """Bytes per second of the emulated link now (None: as fast as memory copies, or the disk)."""
        return self._assembly.link.bytes_per_s

    @property
    def reader(self) -> StoreReader:
        return self._assembly.reader

    def use_profile(self, profile: Profile) -> None:
        """What systems that go by measured times go by from the next `reconfigure` on."""
        self._assembly.profile = profile

    def set_link(self, bytes_per_s: float | None) -> None:
        """Change the pace of an emulated link (None: as fast as memory copies); UsageError where there is none."""
        if self._link is None:
            raise UsageError("records come from the disk, whose pace cannot be set: load with link='12GB/s'")
        self._assembly.link.bytes_per_s = bytes_per_s
        self.engine.switch.reset()

    def close(self) -> None:
        """Stop the transfer threads, free the slots. The model raises ClosedError from then on."""
        with self._assembly.steps.lock:  # not under a forward of another thread
            self._finalizer()

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def new_cache(self, config: PreTrainedConfig) -> DynamicCache:
        """An empty KV cache whose memory is the plan's: see `models.kv_cache`."""
        return planned_cache(config, self.envelope.max_context)

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: refuse what the plan does not cover, start the step's clock."""
        if self.closed:
            raise ClosedError()
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            ids = kwargs.get("inputs_embeds")
        if kwargs.get("decoder_input_ids") is not None:  # what grows and gets logits, in an encoder-decoder model
            ids = kwargs["decoder_input_ids"]
        if not isinstance(ids, torch.Tensor):
            return
        batch, tokens = ids.shape[0], ids.shape[1]
        cache: Any = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if past:
            plan_layers(cache, self.envelope.max_context)
        keep = kwargs.get("logits_to_keep", 0)
        rows = len(keep) if isinstance(keep, torch.Tensor) else keep or tokens
        check_envelope(self.envelope, batch=batch, tokens=tokens, context=past + tokens, logit_rows=batch * rows)
        prompt = tokens > 1 or not past
        engine, steps, native = self.engine, self._assembly.steps, self._assembly.native
        if not past:
            engine.begin_request()
        follow(self._assembly.copied_configs)
        if native is not None and native.changed():
            native.refresh()
        spans = tuple([Span(sequence, tokens, past, prompt) for sequence in range(batch)])
        steps.begin(spans, native=native is not None and native.allowed and not _wants_gradients(ids))
        engine.begin_step(prompt, ids)

    def after_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the model: end the step."""
        steps = self._assembly.steps
        if steps.end():
            self.engine.end_step(steps.current.prefill)

    def threads(self) -> AbstractContextManager[None]:
        """How a forward uses threads; a raw codec's products are torch's own, and so are all without the extension."""
        return threads.torch_alone() if self._packed and native.extension() is not None else nullcontext()

    def _total(self, prefill: bool) -> StepStats:
        layers = sum(self.engine.accounting.layers(prefill), StepStats())
        times = self._assembly.steps.times
        own = times.prefill if prefill else times.decode
        return replace(layers, tokens=own.tokens, forwards=own.forwards, total_s=own.total_s)


def _wants_gradients(given: torch.Tensor) -> bool:
    return given.requires_grad and torch.is_grad_enabled()


def _shut_down(engine: list[Engine], reader: StoreReader) -> None:
    try:
        engine[0].close()
    finally:
        reader.close()


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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.fate.threads():  # not by torch's hooks: after a KeyboardInterrupt it calls none
            return super().__call__(*args, **kwargs)

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
    body = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    if hasattr(cls, "generate"):  # a classifier does not
        body["generate"] = generate_within_plan(cls.generate)
    model.__class__ = type(cls.__name__, (FateModel, cls), body)
    object.__setattr__(model, "fate", session)
    object.__setattr__(model, "hf_device_map", {"": "cpu"})  # a pipeline must not move it to an accelerator
    model.register_forward_pre_hook(session.before_forward, with_kwargs=True)
    model.register_forward_hook(session.after_forward, with_kwargs=True)
