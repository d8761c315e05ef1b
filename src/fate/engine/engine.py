"""One engine: a tier of slots, residency and prefetching for one system at one size. A model may have several in turn
(`Session.reconfigure`); its dense weights and its hooks stay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fate.engine.accounting import Accounting
from fate.engine.prefetch import Prefetcher
from fate.engine.residency import Residency
from fate.engine.slots import SlotPool
from fate.engine.switch import PrefetchSwitch
from fate.plan.budget import MemoryPlan
from fate.predict import Predictor
from fate.systems import System


@dataclass(eq=False)
class Engine:
    """notes: what it decided by measurement, in one line each. stop_asked: raise KeyboardInterrupt where the next layer
    begins, where nothing is under way."""

    system: System
    plan: MemoryPlan
    residency: Residency
    pool: SlotPool
    predictor: Predictor
    prefetch: Prefetcher
    switch: PrefetchSwitch
    accounting: Accounting
    notes: list[str] = field(default_factory=list)
    stop_asked: bool = False

    def begin_step(self, prefill: bool, given: Any) -> None:
        """A forward of a prompt's tokens, or of each sequence's next, begins. given: the model's input."""
        if prefill:
            self.switch.begin_prompt()
        else:
            self.switch.begin_step()
        with self.residency.lock:
            self.prefetch.begin_step(prefill, given)

    def end_step(self, prefill: bool) -> None:
        if not prefill:
            self.switch.end_step()

    def begin_request(self) -> None:
        """A new sequence starts: with some systems prediction and eviction go by it."""
        with self.residency.lock:
            self.predictor.begin_request()
            self.residency.cache.begin_request()
            self.accounting.tell_request()

    def stop_if_asked(self) -> None:
        """Called where a layer begins."""
        if self.stop_asked:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Stop the transfer threads, free the slots."""
        try:
            self.residency.close()
        finally:
            self.pool.close()
