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
        mass = 0.0
        for (expert, probability), is_absent, often in zip(output.ranked, output.absent, self._needed):
            if len(named) >= self.top_k and mass >= self.threshold:
                break
            mass += probability
            named.append((expert, often if is_absent else 0.0))
        return named

    def learn(self, output: GateOutput, needed: Collection[int], *, alone: bool = True) -> None:
        """The layer's routing is known. alone: it was that of this row only, not of several together."""
        mass, found, frequencies = 0.0, 0, self._needed
        for rank, (expert, probability) in enumerate(output.ranked):
            hit = expert in needed
            if output.absent[rank]:
                frequencies[rank] += _RANK_RATE * (hit - frequencies[rank])
            if hit and alone:
                found += 1
                self._move(mass, len(needed))
            mass += probability
        if alone:
            for _ in range(len(needed) - found):
                self._move(_CEILING, len(needed))

    def _move(self, mass_before: float, num_needed: int) -> None:
        """Quantile tracking: the threshold settles where a share COVERAGE of needed experts lies below it."""
        step = COVERAGE if mass_before >= self.threshold else COVERAGE - 1
        self.threshold = min(max(self.threshold + _THRESHOLD_RATE * step / num_needed, _FLOOR), _CEILING)
