"""Where the time and the bytes of a run went, layer by layer, and what prefetching gained or lost in it.

>>> with observe(model.fate) as observation:
...     model.generate(ids, max_new_tokens=50)
>>> observation.explain().words
'prefetching saved about 12.3 ms a token, which took 140 ms, and cost 1.9 ms; 7% of the bytes read were not needed'

What it saved cannot be observed, only estimated from the same run. It is the time that reads on demand would have taken
for what prefetches had brought, or were bringing, when their layer asked, less what computing would have hidden.

- A layer that waited in a step all the same would have waited for these bytes too: bytes / speed of the link.
- One that did not wait would have waited for what computing does not hide. How much that hides is seen where layers
  waited: `hidden_s` is how much shorter they waited than their reads took, on average. Where none did, nothing is known
  of it, and the estimate is the most that was saved.

The speed is that of the reads on demand, over the time at least one was under way. The cost is the time the predictor
took, and the time layers waited while the link still carried a prefetch that was not for them. Where the engine tried
prefetching (`PrefetchSwitch`), its own measurement is the better one, and is among the notes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from fate.core import ExpertKey, StepStats
from fate.engine.session import Session
from fate.trace.observer import LayerEvent, Observer
from fate.trace.timeline import Event, Timeline, busy_s

MAX_READS = 10_000  # of each phase, for the link's speed: enough for that, and some 2 MB


@dataclass(frozen=True)
class PhaseExplanation:
    """Prompts, or decoding. stats: of whole forwards. layers: of each MoE layer, from routing to sum.
    prefetches: whether the system prefetches at all.

    link_bytes_per_s: None where nothing was read. hidden_s: of a step's reads on demand, the time in which its layer
    computed; None where no layer waited. saved_s: by layer, the waiting that prefetches for it saved, an estimate (see
    the module); None: not known. delayed_s: by layer, how long it waited while a prefetch was read that it did not
    need.
    """

    stats: StepStats
    layers: tuple[StepStats, ...]
    prefetches: bool
    link_bytes_per_s: float | None
    hidden_s: float | None
    saved_s: tuple[float, ...] | None
    delayed_s: tuple[float, ...]

    @property
    def all_layers(self) -> StepStats:
        return sum(self.layers, StepStats())

    @property
    def outside_s(self) -> float:
        """Attention, routers, shared experts, dense layers, LM head."""
        return max(self.stats.total_s - self.all_layers.total_s, 0.0)

    @property
    def all_saved_s(self) -> float | None:
        return None if self.saved_s is None else sum(self.saved_s)

    def cost_s(self, layer: int | None = None) -> float:
        """Of one layer, or of all: predicting, and waiting for a prefetch to step aside."""
        return self._stats(layer).predict_s + (sum(self.delayed_s) if layer is None else self.delayed_s[layer])

    def gain_s(self, layer: int | None = None) -> float | None:
        """What prefetches for one layer, or for all, saved, less the cost. None where there were none, or what they
        saved is not known."""
        stats = self._stats(layer)
        if self.saved_s is None or not (stats.prefetch_used_bytes or stats.prefetch_bytes or stats.predict_s):
            return None
        return (sum(self.saved_s) if layer is None else self.saved_s[layer]) - self.cost_s(layer)

    def coverage(self, stats: StepStats) -> float | None:
        return stats.coverage if self.prefetches and stats.uncached else None

    def to_json(self) -> dict[str, Any]:
        """Sums over the phase, in seconds and bytes: `core.StepStats` and what follows from it."""
        return {
            "tokens": self.stats.tokens,
            "total_s": self.stats.total_s,
            "outside_experts_s": self.outside_s,
            "link_bytes_per_s": self.link_bytes_per_s,
            "hidden_s": self.hidden_s,
            "all_layers": self._json_of(None),
            "layers": [self._json_of(layer) for layer in range(len(self.layers))],
        }

    def _json_of(self, layer: int | None) -> dict[str, Any]:
        stats = self._stats(layer)
        counters = {name: value for name, value in asdict(stats).items() if name not in ("tokens", "forwards")}
        return {
            **counters,
            "hit_rate": stats.hit_rate if stats.accesses else None,
            "recall": stats.recall if stats.asked else None,
            "coverage": self.coverage(stats),
            "wasted_bytes": wasted_bytes(stats),
            "saved_s": self.all_saved_s if self.saved_s is None or layer is None else self.saved_s[layer],
            "delayed_s": sum(self.delayed_s) if layer is None else self.delayed_s[layer],
            "gain_s": self.gain_s(layer),
        }

    def _stats(self, layer: int | None) -> StepStats:
        return self.all_layers if layer is None else self.layers[layer]


@dataclass(frozen=True)
class Explanation:
    """notes: what the engine decided by measurement meanwhile."""

    prefill: PhaseExplanation
    decode: PhaseExplanation
    notes: tuple[str, ...]

    @property
    def words(self) -> str:
        """What prefetching gained or lost, in one line: of decoding, or of the prompt where nothing was decoded."""
        decoded = self.decode.stats.tokens
        phase, scale, each = (self.decode, decoded, " a token") if decoded else (self.prefill, 1, "")
        layers = phase.all_layers
        took, waited, cost = (
            format_ms(seconds / scale) for seconds in (phase.stats.total_s, layers.stall_s, phase.cost_s())
        )
        if not layers.misses and not layers.prefetch_used_bytes:
            return f"every expert needed was in memory; computing took {took}{each}"
        if not phase.prefetches:
            return f"this system does not prefetch: layers waited {waited} of {took}{each} for experts"
        if not layers.prefetch_bytes and not layers.prefetch_used_bytes:
            return f"nothing was prefetched: predicting cost {cost}, and layers waited {waited} of {took}{each}"
        saved = phase.all_saved_s
        about = "at most" if phase.hidden_s is None else "about"
        estimate = "an unknown time" if saved is None else f"{about} {format_ms(saved / scale)}"
        wasted = wasted_bytes(layers) / layers.bytes_moved if layers.bytes_moved else 0.0
        return (
            f"prefetching saved {estimate}{each}, which took {took}, and cost {cost}; {wasted:.0%} of the bytes read "
            "were not needed"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "words": self.words,
            "notes": list(self.notes),
            "prefill": self.prefill.to_json(),
            "decode": self.decode.to_json(),
        }


@contextmanager
def observe(session: Session) -> Iterator[Observation]:
    """Watch what `session` does as long as the context is open. Its engine must stay the same meanwhile."""
    observation = Observation(session)
    with session.observed_by(observation.watch):
        yield observation


class Observation:
    """What happened to `session` since; made by `observe`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._before = session.stats(), session.layer_stats(), len(session.notes)
        self.watch = _Watch(session)

    def explain(self) -> Explanation:
        stats_before, layers_before, notes_before = self._before
        session, watch = self._session, self.watch
        stats = session.stats() - stats_before
        layers = [now - before for now, before in zip(session.layer_stats(), layers_before, strict=True)]
        prompts, decoding = watch.reads[True].events, watch.reads[False].events
        prefetches = session.system.prefetches
        prefill, decode = [layer.prefill for layer in layers], [layer.decode for layer in layers]
        return Explanation(
            explain_phase(stats.prefill, prefill, prefetches, watch.waits[True], prompts or decoding),
            explain_phase(stats.decode, decode, prefetches, watch.waits[False], decoding or prompts),
            tuple(session.notes[notes_before:]),
        )


@dataclass
class LayerWaits:
    """Steps of one layer, summed: those in which it waited, and those in which it did not, thanks to prefetches.

    delayed_s: how long it waited while a prefetch that it did not need was read.
    """

    waited_steps: int = 0
    waited_s: float = 0.0
    waited_demand_bytes: int = 0
    waited_used_bytes: int = 0
    calm_steps: int = 0
    calm_demand_bytes: int = 0
    calm_used_bytes: int = 0
    delayed_s: float = 0.0

    def add(self, stall_s: float, demand_bytes: int, used_bytes: int) -> None:
        """One step."""
        if stall_s:
            self.waited_steps += 1
            self.waited_s += stall_s
            self.waited_demand_bytes += demand_bytes
            self.waited_used_bytes += used_bytes
        elif used_bytes:
            self.calm_steps += 1
            self.calm_demand_bytes += demand_bytes
            self.calm_used_bytes += used_bytes


class _Watch(Observer):
    """Of all that happens, what the estimate needs, each phase (prefill or not) apart."""

    def __init__(self, session: Session) -> None:
        layers = session.layer_stats()
        self.reads = {prefill: Timeline(MAX_READS) for prefill in (False, True)}
        self.waits = {prefill: [LayerWaits() for _ in layers] for prefill in (False, True)}
        self._prefill = True  # of the layer that spoke last
        self._prefetches: deque[Event] = deque(maxlen=8)  # the last that were read
        self._last = {
            False: [_waiting(layer.decode) for layer in layers],
            True: [_waiting(layer.prefill) for layer in layers],
        }

    def on_read(self, key: ExpertKey, kind: str, start_s: float, end_s: float, num_bytes: int) -> None:
        self.reads[self._prefill].add(start_s, end_s, kind, *key, num_bytes)
        if kind == "prefetch":
            self._prefetches.append(Event(start_s, end_s, kind, *key, num_bytes))

    def on_layer(self, event: LayerEvent) -> None:
        prefill, layer = event.routing.prefill, event.routing.layer
        self._prefill = prefill
        waits = self.waits[prefill][layer]
        waits.delayed_s += sum(self._delay(event, *stall) for stall in event.stalls)
        now, before = _waiting(event.stats), self._last[prefill][layer]
        self._last[prefill][layer] = now
        waits.add(now[0] - before[0], now[1] - before[1], now[2] - before[2])

    def _delay(self, event: LayerEvent, start_s: float, end_s: float) -> float:
        """How long of this wait a prefetch was read that the waiting layer did not need; one is read at a time."""
        layer, needed = event.routing.layer, event.routing.pairs_per_expert
        others = [read for read in list(self._prefetches) if read.layer != layer or read.expert not in needed]
        return sum(max(min(read.end_s, end_s) - max(read.start_s, start_s), 0.0) for read in others)


def _waiting(stats: StepStats) -> tuple[float, int, int]:
    return stats.stall_s, stats.demand_bytes, stats.prefetch_used_bytes


def explain_phase(
    stats: StepStats,
    layers: Sequence[StepStats],
    prefetches: bool,
    waits: Sequence[LayerWaits],
    reads: Sequence[Event],
) -> PhaseExplanation:
    """reads: those of the phase, or, where there were none, others over the same link."""
    speed, hidden_s, saved_s = link_bytes_per_s(reads), None, None
    if speed is not None:
        if steps := sum(one.waited_steps for one in waits):
            read_s = sum(one.waited_demand_bytes for one in waits) / speed
            hidden_s = max(read_s - sum(one.waited_s for one in waits), 0.0) / steps
        saved_s = [_saved_s(one, speed, hidden_s or 0.0) for one in waits]
    elif not any(one.calm_used_bytes for one in waits):
        saved_s = [0.0] * len(layers)
    known = tuple(saved_s) if prefetches and saved_s is not None else None
    delayed_s = tuple(one.delayed_s for one in waits)
    return PhaseExplanation(stats, tuple(layers), prefetches, speed, hidden_s, known, delayed_s)


def _saved_s(waits: LayerWaits, link_bytes_per_s: float, hidden_s: float) -> float:
    """Never more than the time the link took for what was prefetched and used: what computing hides of a layer's reads
    is taken off its demands first."""
    left_s = max(waits.calm_steps * hidden_s - waits.calm_demand_bytes / link_bytes_per_s, 0.0)
    unhidden_s = max(waits.calm_used_bytes / link_bytes_per_s - left_s, 0.0)
    return waits.waited_used_bytes / link_bytes_per_s + unhidden_s


def format_ms(seconds: float) -> str:
    """>>> format_ms(0.0123), format_ms(0.140)
    ('12.3 ms', '140 ms')
    """
    ms = 1000 * seconds
    return f"{ms:.{2 if abs(ms) < 10 else 1 if abs(ms) < 100 else 0}f} ms"


def wasted_bytes(stats: StepStats) -> int:
    """Prefetched bytes that no layer used; what one phase reads and the next uses would count as less than none."""
    return max(stats.wasted_bytes, 0)


def link_bytes_per_s(reads: Sequence[Event]) -> float | None:
    """Bytes of reads on demand (of prefetches, where there are none) over the time at least one was under way."""
    chosen = [read for read in reads if read.kind == "demand"] or list(reads)
    busy = busy_s(chosen)
    return sum(read.num_bytes for read in chosen) / busy if busy else None
