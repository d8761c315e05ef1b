"""How far a gate's word on a later layer can be trusted, learned while running.

One `Calibration` serves one layer at one distance. It counts how often the candidate at each rank turned out to be
needed, and how much of the gate's probability must be named before the needed experts are covered: where the gate is
sure, few candidates past top-k are named, where it is unsure more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

Ranked = Sequence[tuple[int, float]]

COVERAGE = 0.97  # share of needed experts that the named candidates should contain
_RANK_RATE = 0.02  # weight of one token in the frequencies: the last fifty or so count
_THRESHOLD_RATE = 0.01
_FLOOR, _CEILING = 0.1, 1.0


class Calibration:
    """top_k experts are named at least. Frequencies start where a fair predictor's are."""

    def __init__(self, top_k: int, limit: int) -> None:
        self.top_k = top_k
        self.threshold = 0.6  # cumulative gate probability
        self._needed = [0.75 if rank < top_k else 0.2 * (limit - rank) / limit for rank in range(limit)]

    def confident(self, ranked: Ranked) -> list[tuple[int, float]]:
        """The candidates to name: (expert, how often one of its rank is needed), the likeliest first."""
        named, mass = [], 0.0
        for rank, (expert, probability) in enumerate(ranked):
            if rank >= self.top_k and mass >= self.threshold:
                break
            mass += probability
            named.append((expert, self._needed[rank]))
        return named

    def learn(self, ranked: Ranked, needed: Collection[int]) -> None:
        """The layer's routing is known: `ranked` is what the gate had said of it, whole."""
        mass, found = 0.0, 0
        for rank, (expert, probability) in enumerate(ranked):
            hit = expert in needed
            self._needed[rank] += _RANK_RATE * (hit - self._needed[rank])
            if hit:
                found += 1
                self._move(mass, len(needed))
            mass += probability
        for _ in range(len(needed) - found):
            self._move(_CEILING, len(needed))

    def _move(self, mass_before: float, num_needed: int) -> None:
        """Quantile tracking: the threshold settles where a share COVERAGE of needed experts lies below it."""
        step = COVERAGE if mass_before >= self.threshold else COVERAGE - 1
        self.threshold = min(max(self.threshold + _THRESHOLD_RATE * step / num_needed, _FLOOR), _CEILING)
