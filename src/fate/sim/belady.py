"""The fewest misses any eviction can reach on a trace, by knowing the future.

Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966;
here with a step's experts needed together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fate.trace import RoutingTrace

NEVER = 1 << 62


def belady_misses(trace: RoutingTrace, capacities: Sequence[int], *, bypass: bool = False) -> list[int]:
    """Minimum misses of each layer with `capacities` slots, over all steps, starting from an empty cache.

    It bounds every policy in the runtime, where what a step needs is cached, as far as it fits, without evicting what
    the step needs too. Which experts leave is free, and so is which of a step's experts stay when they do not all fit.
    bypass: a loaded expert may also pass through although others could make room for it, which bounds caches that
    choose what to admit.
    """
    return [
        fewest_misses([step.layers[layer] for step in trace.steps], capacity, bypass=bypass)
        for layer, capacity in enumerate(capacities)
    ]


def fewest_misses(steps: Sequence[Iterable[int]], capacity: int, *, bypass: bool = False) -> int:
    """Minimum misses of one layer whose steps need these sets of experts."""
    needed = [frozenset(step) for step in steps]
    cached: dict[int, int] = {}  # expert -> when it is needed next
    misses = 0
    for experts, uses in zip(needed, _next_uses(needed)):
        misses += len(experts - cached.keys())

        def order(item: tuple[int, int], needed_now: dict[int, int] = uses) -> tuple[bool, int]:
            expert, next_use = item
            return not bypass and expert not in needed_now, next_use

        cached = dict(sorted({**cached, **uses}.items(), key=order)[:capacity])
    return misses


def _next_uses(needed: Sequence[frozenset[int]]) -> list[dict[int, int]]:
    """For each step, when each of its experts is needed next (NEVER: not again)."""
    upcoming: dict[int, int] = {}
    found: list[dict[int, int]] = []
    for at in range(len(needed) - 1, -1, -1):
        found.append({expert: upcoming.get(expert, NEVER) for expert in needed[at]})
        upcoming.update(dict.fromkeys(needed[at], at))
    return found[::-1]
