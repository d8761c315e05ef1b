"""Modules of a model whose few tokens' forward is one native call: transformers' own modules otherwise.

A module is recognised by what it holds, and becomes an instance of a subclass of its class (of the same name) whose
forward takes the quick way where it is known to agree with the class's own. That is found out by trial: the first time
a call could be quick, both ways are asked about random inputs (`base.Fused`). Everything else - several tokens of one
sequence, other dtypes, masks, gradients, hooks on a module that would be passed over - runs the class's own forward.

>>> fuse(model)
"""

from __future__ import annotations

from transformers import PreTrainedModel

from fate.kernels import native
from fate.models.fused.attention import FusedAttention
from fate.models.fused.base import Fused
from fate.models.fused.block import FusedBlock
from fate.models.fused.layer import FusedLayer
from fate.models.fused.linear import FusedLinear
from fate.models.fused.mlp import FusedMLP
from fate.models.fused.norm import FusedRMSNorm
from fate.models.fused.router import FusedRouter

__all__ = ["Fused", "fuse"]

# What is held before what holds it: attention wants to know which of its norms are ours.
_KINDS: tuple[type[Fused], ...] = (
    FusedRMSNorm,
    FusedLinear,
    FusedMLP,
    FusedRouter,
    FusedAttention,
    FusedBlock,
    FusedLayer,
)


def fuse(model: PreTrainedModel) -> None:
    """Give the modules of `model` that look like one of our kinds their quick way. Changes no weight."""
    if native.extension() is None:
        return
    for kind in _KINDS:
        for module in model.modules():
            if not isinstance(module, Fused) and kind.recognises(module):
                kind.take(module)
