"""The fewest bytes a cache could have moved: Belady's misses on the routing of the very requests that were measured.

All systems of a cell are held against the same: slots less the least transient region, shared equally by the layers,
full records, no prefetches needed because the future is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fate.cache import ALLOCATIONS, SlotRequest
from fate.engine.session import FateModel
from fate.plan import needs as planning
from fate.sim.belady import belady_misses
from fate.store.format import StoreHeader
from fate.trace import RoutingTrace, TraceStep


def split_requests(trace: RoutingTrace) -> list[list[TraceStep]]:
    """The steps of each request: one begins where a prompt follows decoding."""
    requests: list[list[TraceStep]] = []
    for at, step in enumerate(trace.steps):
        if at == 0 or (step.prefill and not trace.steps[at - 1].prefill):
            requests.append([])
        requests[-1].append(step)
    return requests


class Minimum:
    """Belady's bytes for `measured` requests that follow `warm_up`, both as split by `split_requests`. record_bytes:
    of each layer."""

    def __init__(
        self,
        trace: RoutingTrace,
        warm_up: Sequence[Sequence[TraceStep]],
        measured: Sequence[Sequence[TraceStep]],
        record_bytes: Sequence[int],
    ) -> None:
        self._trace = trace
        self._warm_up = [step for request in warm_up for step in request]
        self._measured = measured
        self._record_bytes = record_bytes

    def bytes_per_token(self, capacities: Sequence[int]) -> dict[str, float]:
        """By phase. A part's bytes are the fewest for all up to its end less the fewest for all up to its beginning."""
        moved = {"prefill": 0, "decode": 0}
        tokens = {"prefill": 0, "decode": 0}
        steps = list(self._warm_up)
        before = self._fewest_bytes(steps, capacities)
        for request in self._measured:
            for phase in moved:
                part = [step for step in request if step.prefill == (phase == "prefill")]
                steps += part
                after = self._fewest_bytes(steps, capacities)
                moved[phase] += after - before
                tokens[phase] += sum(step.tokens for step in part)
                before = after
        return {phase: moved[phase] / tokens[phase] for phase in moved}

    def _fewest_bytes(self, steps: list[TraceStep], capacities: Sequence[int]) -> int:
        misses = belady_misses(replace(self._trace, steps=tuple(steps)), capacities)
        return sum(count * size for count, size in zip(misses, self._record_bytes, strict=True))


def equal_capacities(model: FateModel, header: StoreHeader) -> list[int]:
    """Cached experts of each layer if the model's slots, less the least transient region, were shared equally."""
    counts = [layer.num_experts for layer in header.layers]
    slots = model.fate.plan.num_slots - planning.transient_slots(model, header)
    return ALLOCATIONS.get("uniform")(SlotRequest(counts, slots, planning.LAYER_FLOOR))
