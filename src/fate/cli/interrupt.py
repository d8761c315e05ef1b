"""Ctrl-C that stops an answer, not the conversation.

An exception at any moment would cost the experts in memory (after one, the engine starts from an empty cache) and leave
the KV cache between two states. So the first Ctrl-C is only noted, and raised where the next MoE layer begins: there
nothing is under way. The second is raised at once.
"""

from __future__ import annotations

import signal
from types import FrameType

from fate.engine.session import FateModel


class AnswerInterrupt:
    """While entered, Ctrl-C raises KeyboardInterrupt between two layers of `model`. `insisted`: it came twice."""

    def __init__(self, model: FateModel) -> None:
        self._session = model.fate

    def __enter__(self) -> AnswerInterrupt:
        self.insisted = self._noted = False
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._previous)
        self._session.stop_at_next_layer(False)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            self.insisted = True
            raise KeyboardInterrupt
        self._noted = True
        self._session.stop_at_next_layer()
