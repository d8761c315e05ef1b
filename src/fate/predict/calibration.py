"""How far a gate's prediction for a later layer can be trusted, learned while running.

One `Calibration` serves one layer at one distance. It counts how often the candidate at each rank turned out to be
needed, of those that were not in memory (what is resident is likelier to be needed again, and needs no prefetch). And
it learns how much of the gate's probability must be named before the needed experts are covered. Where the gate is
sure, few candidates past top-k are named, where it is unsure more.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence

COVERAGE = 0.97  # share of needed experts that the named candidates should contain
_RANK_RATE = 0.03  # weight of one token in the frequencies: the last thirty or so count
_THRESHOLD_RATE = 0.01
_FLOOR, _CEILING = 0.1, 1.0


class GateOutput:
    """What a gate gave for a layer and a row: candidates with probabilities, and which of them were not in memory."""

    __slots__ = ("absent", "ranked")

    def __init__(self, ranked: Sequence[tuple[int, float]], cached: Container[int]) -> None:
        self.ranked = ranked
        self.absent = [expert not in cached for expert, _ in ranked]


class Calibration:
    """top_k experts are named at least. Frequencies start where a fair predictor's are."""

    def __init__(self, top_k: int, limit: int) -> None:
        self.top_k = top_k
        self.threshold = 0.6  # cumulative gate probability
        self._needed = [0.6 if rank < top_k else 0.2 * (limit - rank) / limit for rank in range(limit)]

    def confident(self, output: GateOutput) -> list[tuple[int, float]]:
        """The candidates to name: (expert, how often one of its rank was needed; 0 for what is in memory)."""
        named: list[tuple[int, float]] = []
        mass, threshold, optional = 0.0, self.threshold, 1 - self.top_k
        for (expert, probability), is_absent, often in zip(output.ranked, output.absent, self._needed):
            if mass >= threshold and optional > 0:
                break
            optional += 1
            mass += probability
            named.append((expert, often if is_absent else 0.0))
        return named

    def learn(self, output: GateOutput, needed: Collection[int], *, alone: bool = True) -> None:
        """The layer's routing is known. alone: it was that of this row only, not of several together."""
        frequencies = self._needed
        mass, masses = 0.0, []  # the mass named before each needed expert
        for rank, ((expert, probability), is_absent) in enumerate(zip(output.ranked, output.absent)):
            hit = expert in needed
            if is_absent:
                frequencies[rank] += _RANK_RATE * (hit - frequencies[rank])
            if hit:
                masses.append(mass)
            mass += probability
        if alone and needed:
            masses += [_CEILING] * (len(needed) - len(masses))
            self._move(masses)

    def _move(self, masses: list[float]) -> None:
        """Quantile tracking: the threshold settles where a share COVERAGE of needed experts lies below it."""
        threshold, rate = self.threshold, _THRESHOLD_RATE / len(masses)
        for mass in masses:
            threshold += rate * (COVERAGE if mass >= threshold else COVERAGE - 1)
            threshold = _FLOOR if threshold < _FLOOR else min(threshold, _CEILING)
        self.threshold = threshold
