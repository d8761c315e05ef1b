"""Ctrl-C that stops an answer, not the conversation.

An exception at any moment would cost the experts in memory (after one, the engine starts from an empty cache) and leave
the KV cache between two states. So the first Ctrl-C is only noted, and raised where the next MoE block begins: there
nothing is under way. The second is raised at once.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from fate.engine.session import FateModel
from fate.models.adapter import find_moe_layers


class AnswerInterrupt:
    """While entered, Ctrl-C raises KeyboardInterrupt between two layers of `model`. `insisted`: it came twice."""

    def __init__(self, model: FateModel) -> None:
        self._blocks = [layer.block for layer in find_moe_layers(model)]

    def __enter__(self) -> AnswerInterrupt:
        self.insisted = self._noted = False
        self._hooks = [block.register_forward_pre_hook(self._on_block, prepend=True) for block in self._blocks]
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._previous)
        for hook in self._hooks:
            hook.remove()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            self.insisted = True
            raise KeyboardInterrupt
        self._noted = True

    def _on_block(self, module: Any, args: Any) -> None:
        if self._noted:
            raise KeyboardInterrupt
