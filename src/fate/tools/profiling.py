"""Measures a `Profile` on a loaded model: reads of single experts, layers at several numbers of tokens, and a text.

Everything runs on engines of its own, from the disk, on no more memory than the model has; the engine that was there
comes back as it was configured, but empty. Limits on time keep it to some 30 seconds for a model of 8 GB on two cores.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import torch

from fate.core import Envelope, ExpertKey, Precision
from fate.engine.session import FateModel, Session
from fate.errors import UsageError
from fate.plan.budget import MemoryPlan
from fate.plan.profile import LayerProfile, Machine, Profile
from fate.sim.curves import lru_miss_curves
from fate.store.format import RecordLayout, StoreHeader
from fate.systems import System
from fate.trace import RoutingTrace
from fate.trace.timeline import Event, busy_s

TOKENS = (1, 4, 16, 64, 256)  # of the forwards that are timed, as far as the plan covers them
_REPEATS = 10
_LIMIT_S = 2.0  # no further repeat of a forward, nor further read, after so long
_COMPUTE_LIMIT_S = 14.0  # nor further numbers of tokens, once there are two
_SINGLE_READS = 16
_BATCHES = 4
_PROMPT_TOKENS = 32
_DECODED_TOKENS = 160
_TEXT_LIMIT_S = 8.0
_ON_DEMAND = System("profiling-on-demand")
_CROSS_LAYER = System("profiling-cross-layer", predictor="cross-layer")

SAMPLE_TEXT = '''The harbour was quiet when the first boat came home. Two men lifted the crates onto the stones, counted
them, and wrote the number in a small grey book. "Forty-one," said the older one. "Yesterday we had sixty." Nobody knew
why the fish had moved north, though the scientist from the university believed that the water had become warmer by
almost half a degree in ten years. She measured it every morning: temperature, salt, oxygen, and the time of day.

Question: a train leaves at 9:40 and travels 150 kilometres at 60 kilometres an hour. When does it arrive?
Answer: it travels for 150 / 60 = 2.5 hours, so it arrives at 12:10.

def moving_average(values: list[float], width: int) -> list[float]:
    """Mean of each window of `width` neighbours."""
    if width < 1:
        raise ValueError("width must be positive")
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        if index + 1 >= width:
            means.append(total / width)
    return means
'''


@torch.inference_mode()
def measure(
    model: FateModel, text_ids: torch.Tensor | None = None, progress: Callable[[str], None] | None = None
) -> Profile:
    """text_ids: token ids [tokens] of a text like those to come (None: random ones, whose routing means little).
    progress: told what is measured now. The counters of `model.fate` start again from nothing.

    Raises UsageError for a text without tokens, and what a forward raises.
    """
    say = progress or (lambda _what: None)
    ids = _random_ids(model) if text_ids is None else text_ids[None]
    if ids.shape[1] == 0:
        raise UsageError("the text has no tokens: give a longer text")
    session = model.fate
    with session.generate_lock, _put_back(session):
        slots = _slots(session.plan)
        session.reconfigure(system=_ON_DEMAND, experts=slots)
        header = session.reader.header
        say("reading experts")
        reads = _measure_reads(session)
        say("computing layers")
        compute = _measure_compute(model, ids)
        session.reconfigure(system=_CROSS_LAYER, experts=min(slots or header.num_records, _half(header)))
        say("following a text")
        text = _follow_text(model, ids)
    return _profile(header, Machine.current(session.reader.path), reads, compute, text)


def _profile(
    header: StoreHeader, machine: Machine, reads: _Reads, compute: dict[int, list[float]], text: _Text
) -> Profile:
    layers = []
    for at in range(len(header.layers)):
        layout = header.layout(at)
        int2 = Precision.INT2 in layout.precisions
        layers.append(
            LayerProfile(
                compute_s=tuple(seconds[at] for seconds in compute.values()),
                full_s=reads.seconds[_length(layout, Precision.FULL)],
                full_bytes=_length(layout, Precision.FULL),
                int2_s=reads.seconds[_length(layout, Precision.INT2)] if int2 else None,
                int2_bytes=_length(layout, Precision.INT2) if int2 else None,
                recall=text.recall[at],
                misses=text.misses[at],
            )
        )
    return Profile(header.fingerprint, machine, tuple(compute), reads.bytes_per_s, tuple(layers))


@contextmanager
def _put_back(session: Session) -> Iterator[None]:
    """In the end the session has the engine it had: system, slots and slower tier, with its pace."""
    system, slots, link = session.system, _slots(session.plan), session.link
    pace = session.pace
    try:
        yield
    finally:
        if not session.closed:
            session.reconfigure(system=system, experts=slots, link=link)
            if link is not None:
                session.set_link(pace)


def _slots(plan: MemoryPlan) -> int | None:
    """What `reconfigure` takes as experts to give as many slots as now."""
    limited = plan.num_slots <= max(plan.needs.total_experts, plan.needs.min_slots)
    return plan.num_slots if limited else None


def _half(header: StoreHeader) -> int:
    """A gate is asked only of layers that do not cache all of their experts."""
    return max(1, header.num_records // 2)


def _random_ids(model: FateModel) -> torch.Tensor:
    tokens = min(max(TOKENS), model.fate.envelope.max_context)
    seeded = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens), generator=seeded)


@dataclass(frozen=True)
class _Reads:
    """seconds: of one read, by its length in bytes. bytes_per_s: of reads in sequence."""

    seconds: dict[int, float]
    bytes_per_s: float


def _measure_reads(session: Session) -> _Reads:
    """Through the engine's own transfers, on an idle link and from an empty cache."""
    header = session.reader.header
    chosen = random.Random(0)
    keys: dict[RecordLayout, list[ExpertKey]] = defaultdict(list)
    for at, layer in enumerate(header.layers):
        keys[header.layout(at)] += [ExpertKey(at, expert) for expert in range(layer.num_experts)]
    seconds = {}
    for layout, of_layout in keys.items():
        for precision in layout.precisions:
            reads: list[float] = []
            start = time.perf_counter()
            for key in chosen.sample(of_layout, min(_SINGLE_READS, len(of_layout))):
                reads += [event.duration_s for event in _read(session, [key], precision)]
                if time.perf_counter() - start > _LIMIT_S:
                    break
            seconds[_length(layout, precision)] = median(reads)
    everything = [key for of_layout in keys.values() for key in of_layout]
    batch = min(session.engine.residency.cache.transient, len(everything))
    batches = (_read(session, chosen.sample(everything, batch), Precision.FULL) for _ in range(_BATCHES))
    return _Reads(seconds, median(sum(event.num_bytes for event in events) / busy_s(events) for events in batches))


def _read(session: Session, keys: Sequence[ExpertKey], precision: Precision) -> list[Event]:
    """Demand experts that are not resident, as many as the transient region takes; returns their reads."""
    residency = session.engine.residency
    with residency.lock, session.record() as timeline:
        residency.read_through(keys, precision)
    return [event for event in timeline.events if event.num_bytes]


def _length(layout: RecordLayout, precision: Precision) -> int:
    return layout.span(None, precision)[1]


def _measure_compute(model: FateModel, ids: torch.Tensor) -> dict[int, list[float]]:
    """Seconds of each layer, by tokens of a forward."""
    measured: dict[int, list[float]] = {}
    began = time.perf_counter()
    for tokens in _sizes(model.fate.envelope):
        if len(measured) > 1 and time.perf_counter() - began > _COMPUTE_LIMIT_S:
            break
        repeated = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
        if not measured:
            _timed_forward(model, repeated)  # the very first also brings the dense weights into memory
        runs: list[list[float]] = []
        start = time.perf_counter()
        while len(runs) < 2 or (len(runs) < _REPEATS and time.perf_counter() - start < _LIMIT_S):
            runs.append(_timed_forward(model, repeated))
        # The first brings experts: new pages and first checksums take the cores that compute, ten times as long.
        measured[tokens] = [median(of_layer) for of_layer in zip(*runs[1:])]
    return dict(sorted(measured.items()))


def _sizes(envelope: Envelope) -> list[int]:
    """The least and the most first: where time is short, the line between them is the best there is."""
    most = min(envelope.prefill_chunk, envelope.max_context, TOKENS[-1])
    least, *others = (tokens for tokens in (*TOKENS, most) if tokens <= most)
    return list(dict.fromkeys((least, most, *others)))


def _timed_forward(model: FateModel, ids: torch.Tensor) -> list[float]:
    """Seconds of each layer in one forward of ids [1, tokens]."""
    session = model.fate
    start = time.perf_counter()
    with session.record() as timeline:
        model(ids, past_key_values=session.new_cache(model.config), use_cache=True, logits_to_keep=1)
    return layer_seconds(timeline.events, time.perf_counter() - start)


def layer_seconds(events: Sequence[Event], forward_s: float) -> list[float]:
    """From each layer's routing to the next one's, less what it waited for bytes, in one forward without prefetches.

    So attention, router and shared experts are in it (the next layer's, which are the same work). What follows the last
    layer is no layer: it gets what lies between the others (where there is but one, all the rest of the forward).
    """
    layers = sorted((event for event in events if event.kind == "layer"), key=lambda event: event.layer)
    stalls: dict[int, float] = defaultdict(float)
    for event in events:
        if event.kind == "stall":
            stalls[event.layer] += event.duration_s
    between = [later.start_s - layer.end_s for layer, later in pairwise(layers)]
    between.append(median(between) if between else forward_s - layers[0].duration_s)
    return [layer.duration_s - stalls[layer.layer] + gap for layer, gap in zip(layers, between)]


@dataclass(frozen=True)
class _Text:
    """Of each layer, as in `LayerProfile`."""

    recall: list[float | None]
    misses: list[tuple[float, ...]]


def _follow_text(model: FateModel, ids: torch.Tensor) -> _Text:
    """Decode a text token by token, with the cross-layer gate asked at each."""
    session = model.fate
    ids = ids[:, : min(_PROMPT_TOKENS + _DECODED_TOKENS, session.envelope.max_context)]
    prompt = max(1, min(_PROMPT_TOKENS, session.envelope.prefill_chunk, ids.shape[1] // 4))
    cache = session.new_cache(model.config)
    with session.record_routing() as recorder:
        model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for token in ids[:, prompt:].split(1, dim=1):
            model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if time.perf_counter() - start > _TEXT_LIMIT_S:
                break
    decode = [layer.decode for layer in session.layer_stats()]
    return _Text([stats.recall if stats.asked else None for stats in decode], _misses_per_step(recorder.trace()))


def _misses_per_step(trace: RoutingTrace) -> list[tuple[float, ...]]:
    """Misses of LRU per decoding step by capacity, of each layer, when the text is followed a second time: a model in
    use has seen every expert, and a first access would be a miss at all capacities."""
    first = tuple(replace(step, prefill=True) for step in trace.steps)
    steps = max(1, sum(not step.prefill for step in trace.steps))
    curves = lru_miss_curves(replace(trace, steps=first + trace.steps), prefill=False)
    return [tuple(round(misses / steps, 6) for misses in _non_increasing(curve)) for curve in curves]


def _non_increasing(curve: Sequence[int]) -> list[int]:
    """More slots can cost LRU a miss more, by the order of hits and misses in a step; an allocation cannot use that."""
    least = list(curve)
    for capacity in range(1, len(least)):
        least[capacity] = min(least[capacity - 1], least[capacity])
    return least
