"""One engine: slots, transfers, residency and prediction for one system at one size. A model may have several in turn
(`Session.reconfigure`); its dense weights and its hooks stay."""

from __future__ import annotations

from dataclasses import dataclass, field

from fate.engine.manager import ExpertManager
from fate.engine.room import GuessRoom
from fate.engine.slots import SlotPool
from fate.engine.switch import PrefetchSwitch
from fate.plan.budget import MemoryPlan
from fate.predict import Predictor
from fate.systems import System


@dataclass(eq=False)
class Engine:
    """room: what the layers' caches get while guesses are given up (None: they never are). notes: what it decided by
    measurement, in one line each."""

    system: System
    plan: MemoryPlan
    manager: ExpertManager
    pool: SlotPool
    predictor: Predictor
    switch: PrefetchSwitch
    room: GuessRoom | None = None
    notes: list[str] = field(default_factory=list)

    def begin_forward(self, prefill: bool) -> None:
        """A forward of a prompt's tokens, or of each sequence's next, begins."""
        self.manager.begin_phase(prefill)
        if prefill:
            self.switch.begin_prompt()
        else:
            self.switch.begin_step()
        if self.room is not None:
            self.room.divide(guessing=not self.switch.resting)

    def begin_request(self) -> None:
        """A new sequence starts: with some systems prediction and eviction go by it."""
        with self.manager.lock:
            self.manager.settle_accounts()
            self.predictor.begin_request()
            self.manager.cache.begin_request()
            if self.manager.recorder is not None:
                self.manager.recorder.begin_request()

    def close(self) -> None:
        """Stop the transfer threads, free the slots."""
        try:
            self.manager.close()
        finally:
            self.pool.close()
