"""How the cache's slots are shared over the layers.

An allocation takes a `SlotRequest` and gives the slots of each layer: at least `floor` (or all its experts, if fewer),
never more than it has experts, and in all no more than there are.

>>> uniform(SlotRequest((8, 8, 8), slots=13, floor=1))
[5, 4, 4]
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fate.errors import MissingCostsError
from fate.registry import Registry


@dataclass(frozen=True)
class SlotRequest:
    """num_experts: of each layer. slots: to share. floor: the least a layer gets. top_k: experts one token uses.

    costs (only for the allocations in NEEDS_COSTS): costs[layer][c] is what a decoding step is expected to
    lose in that layer, in seconds, when it caches c experts, for c = 0 .. num_experts[layer]; it never grows with c.
    """

    num_experts: Sequence[int]
    slots: int
    floor: int
    top_k: int = 1
    costs: Sequence[Sequence[float]] | None = None


Allocation = Callable[[SlotRequest], list[int]]
ALLOCATIONS: Registry[Allocation] = Registry("allocation")
NEEDS_COSTS = frozenset({"measured"})  # allocations that cannot do without `SlotRequest.costs`


@ALLOCATIONS.register("uniform")
def uniform(request: SlotRequest) -> list[int]:
    """The same for every layer; what does not divide goes to the first layers."""
    num_experts = request.num_experts
    shares = _floors(request, request.floor)
    left = request.slots - sum(shares)
    while left > 0 and (open_layers := [i for i, n in enumerate(num_experts) if shares[i] < n]):
        each = max(1, left // len(open_layers))
        for i in open_layers:
            extra = min(each, num_experts[i] - shares[i], left)
            shares[i] += extra
            left -= extra
    return shares


@ALLOCATIONS.register("global")
def global_pool(request: SlotRequest) -> list[int]:
    """One pool for all layers: a layer's share is what its experts win from the others'. What is named here is only how
    the slots would be divided evenly; see `ExpertCache(shared=True)`."""
    return uniform(request)


@ALLOCATIONS.register("shallow")
def shallow(request: SlotRequest) -> list[int]:
    """Layers in order, each with all of its experts, as far as slots go; the others keep a floor.

    A prediction for a shallow layer comes late or is poor (for the first there is none), so its misses cost most. The
    floor is what one token uses, or as near to that as slots allow.
    Source: Fate, arXiv 2502.12224, "shallow-favoring expert caching".
    """
    num_experts = request.num_experts
    shares = _floors(request, request.floor)
    for floor in range(request.floor + 1, request.top_k + 1):
        if sum(raised := _floors(request, floor)) > request.slots:
            break
        shares = raised
    left = request.slots - sum(shares)
    for layer, experts in enumerate(num_experts):
        extra = max(0, min(experts - shares[layer], left))
        shares[layer] += extra
        left -= extra
    return shares


@ALLOCATIONS.register("measured")
def measured(request: SlotRequest) -> list[int]:
    """The least sum of costs[layer][share]: the slots that save most are given first.

    Each layer offers the segments of the lower convex hull of its costs, steepest first; a segment is given as a whole
    while slots last, so a step that saves nothing does not hide the one behind it. Optimal where costs are convex.
    Raises MissingCostsError without costs. Source: marginal analysis (Fox, 1966); on the hull as in Beckmann and
    Sanchez, "Talus", HPCA 2015.
    """
    if request.costs is None:
        raise MissingCostsError("measured")
    shares = _floors(request, request.floor)
    left = request.slots - sum(shares)
    limits = zip(request.costs, shares, request.num_experts, strict=True)
    hulls = [_hull(costs, share, experts) for costs, share, experts in limits]
    offers = [(hull[0].slope, layer, 0) for layer, hull in enumerate(hulls) if hull]
    heapq.heapify(offers)
    while left > 0 and offers:
        _slope, layer, at = heapq.heappop(offers)
        taken = min(hulls[layer][at].slots, left)
        shares[layer] += taken
        left -= taken
        if at + 1 < len(hulls[layer]):
            heapq.heappush(offers, (hulls[layer][at + 1].slope, layer, at + 1))
    return shares


@dataclass(frozen=True)
class _Segment:
    """slope: cost of one slot more, the lower the better."""

    slots: int
    slope: float


def _hull(costs: Sequence[float], first: int, last: int) -> list[_Segment]:
    """Segments of the lower convex hull of costs[first] .. costs[last], in order."""
    hull: list[_Segment] = []
    for share in range(first + 1, last + 1):
        segment = _Segment(1, costs[share] - costs[share - 1])
        while hull and hull[-1].slope >= segment.slope:
            before = hull.pop()
            slots = before.slots + segment.slots
            segment = _Segment(slots, (before.slope * before.slots + segment.slope * segment.slots) / slots)
        hull.append(segment)
    return hull


def _floors(request: SlotRequest, floor: int) -> list[int]:
    return [min(floor, experts) for experts in request.num_experts]
