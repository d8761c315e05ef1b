"""How often one layer's experts were needed lately."""

from __future__ import annotations

from collections.abc import Collection

_RATE = 0.1  # weight of the last token


class RecentPopularity:
    """Exponentially forgotten frequencies of one layer's experts."""

    def __init__(self, num_experts: int) -> None:
        self._frequency = [0.0] * num_experts

    def learn(self, needed: Collection[int]) -> None:
        """One token needed these experts."""
        self._frequency = [old + _RATE * ((expert in needed) - old) for expert, old in enumerate(self._frequency)]

    def ranked(self, limit: int) -> tuple[tuple[int, float], ...]:
        """At most `limit` experts, the most frequent first, each with its share of all."""
        total = sum(self._frequency) or 1.0
        order = sorted(range(len(self._frequency)), key=self._frequency.__getitem__, reverse=True)[:limit]
        return tuple((expert, self._frequency[expert] / total) for expert in order)
