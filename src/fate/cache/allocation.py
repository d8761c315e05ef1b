"""How the cache's slots are shared over the layers.

An allocation is a function (experts of each layer, slots to share, floor) -> slots of each layer. Every layer gets
at least `floor` (or all its experts, if fewer) and never more than it has experts.

>>> uniform([8, 8, 8], 13, floor=1)
[5, 4, 4]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fate.registry import Registry

Allocation = Callable[[Sequence[int], int, int], list[int]]
ALLOCATIONS: Registry[Allocation] = Registry("allocation")


@ALLOCATIONS.register("uniform")
def uniform(num_experts: Sequence[int], slots: int, floor: int) -> list[int]:
    """The same for every layer; what does not divide goes to the first layers."""
    shares = [min(floor, experts) for experts in num_experts]
    left = slots - sum(shares)
    while left > 0 and (open_layers := [i for i, n in enumerate(num_experts) if shares[i] < n]):
        each = max(1, left // len(open_layers))
        for i in open_layers:
            extra = min(each, num_experts[i] - shares[i], left)
            shares[i] += extra
            left -= extra
    return shares
