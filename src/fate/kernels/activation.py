"""What an expert computes between its matrices, as one formula for all families.

    gated    min(act(min(gate, gate_max)), act_max) * (clamp(up, -up_limit, up_limit) + up_offset)
    plain    act(up)

`silu` is x * sigmoid(alpha * x). `silu_softcap` bounds softly, limit * tanh(x / limit), while its sigmoid sees what was
not bounded. `models/activation.py` finds out by trial which of these a module computes.

>>> GPT_OSS = ExpertActivation("silu", interleaved=True, alpha=1.702, gate_max=7.0, up_limit=7.0, up_offset=1.0)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "silu_softcap")  # as the extension numbers them


@dataclass(frozen=True)
class ExpertActivation:
    """kind: one of KINDS. interleaved: the first matrix has rows gate 0, up 0, gate 1, ...; else gates, then ups."""

    kind: str
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    gate_max: float = inf
    act_max: float = inf
    up_limit: float = inf
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "silu_softcap" and not self.gated:
            raise ValueError("silu_softcap is of two halves: gated must be true")

    def __call__(self, hidden: Tensor) -> Tensor:
        """The first matrix's output [tokens, 2 * inner], or [tokens, inner] where nothing gates -> [tokens, inner], in
        the dtype of `hidden`."""
        if not self.gated:
            return self._act(hidden)
        if self.interleaved:
            gate, up = hidden[..., ::2], hidden[..., 1::2]
        else:
            gate, up = hidden.chunk(2, dim=-1)
        if self.kind == "silu_softcap":
            return _softcap(gate, self.gate_max) * torch.sigmoid(gate) * _softcap(up, self.up_limit)
        if self.gate_max < inf:
            gate = gate.clamp(max=self.gate_max)
        activated = self._act(gate)
        if self.act_max < inf:
            activated = activated.clamp(max=self.act_max)
        if self.up_limit < inf:
            up = up.clamp(-self.up_limit, self.up_limit)
        return activated * (up + self.up_offset if self.up_offset else up)

    def _act(self, x: Tensor) -> Tensor:
        if self.kind == "silu":
            return F.silu(x) if self.alpha == 1.0 else x * torch.sigmoid(x * self.alpha)
        if self.kind in ("gelu", "gelu_tanh"):
            return F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return F.relu(x).square() if self.kind == "relu2" else F.relu(x)


SWIGLU = ExpertActivation("silu")


def _softcap(x: Tensor, limit: float) -> Tensor:
    return limit * torch.tanh(x / limit) if limit < inf else x
