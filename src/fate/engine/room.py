"""The room for guesses: the part of the transient region that only guesses use. While prefetching has switched itself
off, the layers' caches have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fate.engine.manager import ExpertManager


@dataclass(frozen=True)
class Division:
    """How the slots are divided: cached experts of each layer, and those of the transient region."""

    capacities: Sequence[int]
    transient: int


class GuessRoom:
    """Divides the slots of `manager` as `guessing` or, while no guesses are made, as `resting` says."""

    def __init__(self, manager: ExpertManager, guessing: Division, resting: Division) -> None:
        self._manager = manager
        self._divisions = {True: guessing, False: resting}
        self._guessing = True

    def divide(self, guessing: bool) -> None:
        """Between two forwards; where something is still being read, the next call does it."""
        if guessing == self._guessing:
            return
        division, manager = self._divisions[guessing], self._manager
        with manager.lock:
            if not manager.sound:
                return
            with manager.between_leases():
                if not guessing:
                    manager.drop_guesses()
                if manager.cache.resize(division.capacities, division.transient):
                    self._guessing = guessing
