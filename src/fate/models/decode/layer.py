"""Decoder layers that decode by two native calls: mixer and routing; experts and sum.

`NativeDecoderLayer` is the mixin, `NativeLayer` the two calls of one layer, built once from its modules. A call that is
not one new token in each sequence over the planned cache, or whose modules somebody listens to, goes by the class's own
`forward`, whose modules compute the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fate.kernels import decode
from fate.models.decode import attention, delta, latent
from fate.models.decode.block import BlockSpec
from fate.models.decode.modules import NativeRMSNorm, children_of, norm_of
from fate.models.decode.watch import Watch, Watched, become, is_unhooked, own_class, records_outputs
from fate.models.forms import ATTENTIONS, LAYERS, digest
from fate.models.kv_cache import is_growing, planned

_NORMS = ("input_layernorm", "post_attention_layernorm")
_MIXERS = ("self_attn", "linear_attn")
# Arguments that do not change what a new token attends to; any other must be None or False.
_HARMLESS = frozenset(
    ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings", "output_router_logits")
)


class NativeDecoderLayer(Watched):
    """Mixin of a decoder layer: `fate_native` is its `NativeLayer`, None while its modules must be called."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        native: NativeLayer | None = self.__dict__.get("fate_native")
        if native is not None and len(args) == 1 and (out := native.run(args[0], kwargs)) is not None:
            return out
        return super().forward(*args, **kwargs)


class NativeLayer:
    """One decoder layer of at most MAX_ROWS rows. layer: what computes its experts, None where the MLP is a module."""

    def __init__(self, module: Any, half: decode.MixerHalf, layer: Any, buffers: decode.Buffers, step: Any) -> None:
        self._mlp = module.mlp
        self._index: int = mixer_of(module).layer_idx
        self._half, self._layer, self._buffers, self._step = half, layer, buffers, step
        self._hidden: int = buffers.normed.shape[1]
        self._dtype = buffers.normed.dtype

    def run(self, x: Any, given: dict[str, Any]) -> Tensor | None:
        """The layer's output [rows, 1, hidden]; None, and nothing is done, for a call of another kind."""
        rows = self._step.native and self._rows(x, given)
        if not rows:
            return None
        cache, rotation = given.get("past_key_values"), self._half.mixer.rotation
        if isinstance(self._half.mixer, decode.DeltaRule):
            cached = None
            place: Any = delta.place(cache, self._index, rows, self._dtype) if is_growing(cache) else None
        else:
            cached = planned(cache, self._index)
            place = None if cached is None else cached.next_rows(rows, self._dtype)
        if place is None:
            return None
        buffers = self._buffers
        rotary = None if rotation is None else given["position_embeddings"]
        with self._step.lock:
            routed = self._half(buffers, x, rotary, place)
            if cached is not None:
                cached.advance()
            if routed is not None:
                out: Tensor = self._layer.run_routed(routed, x, add_residual=True)
                return out
            residual, normed = (held[:rows].view(x.shape).clone() for held in (buffers.residual, buffers.normed))
        out = self._mlp(normed)
        return residual + (out[0] if isinstance(out, tuple) else out)

    def _rows(self, x: Any, given: dict[str, Any]) -> int:
        """How many rows there are; 0 where the call is of another kind."""
        if type(x) is not Tensor or x.dim() != 3 or x.shape[1] != 1 or x.shape[2] != self._hidden:
            return 0
        if x.dtype is not self._dtype or not x.is_contiguous() or given.get("attention_mask") is not None:
            return 0
        rows, rotary = x.shape[0], given.get("position_embeddings")
        # Layers of one step are called alike: what one has found out holds for the others of its kind.
        rotation = self._half.mixer.rotation
        before = self._step.calls.get(rotation)
        if before is None or before[0] is not rotary or before[1] != len(given):
            if rows > decode.MAX_ROWS or not all(map(_is_harmless, given.items())):
                return 0
            if rotation is not None and not _is_rotary(rotary, rows, rotation, self._dtype):
                return 0
            self._step.calls[rotation] = rotary, len(given)
        return 0 if records_outputs() else rows


def _is_rotary(rotary: Any, rows: int, rotation: decode.Rotation, dtype: torch.dtype) -> bool:
    """Whether a mixer of this rotation can take these angles."""
    tensors = rotary if type(rotary) is tuple else (rotary,)
    if len(tensors) != (1 if rotation is decode.Rotation.PAIRS else 2):
        return False
    of = torch.complex64 if rotation is decode.Rotation.PAIRS else dtype
    halves = rotation in (decode.Rotation.HALVES, decode.Rotation.PAIRS_TO_HALVES)
    return all(
        type(t) is Tensor
        and t.dtype is of
        and t.is_contiguous()
        and t.dim() == 3
        and t.shape == tensors[0].shape
        and t.shape[0] in (1, rows)
        and t.shape[1] == 1
        and not (halves and t.shape[2] % 2)
        for t in tensors
    )


def _is_harmless(argument: tuple[str, Any]) -> bool:
    name, value = argument
    return name in _HARMLESS or value is None or value is False


def adopt_layers(model: nn.Module, watch: Watch) -> None:
    """Make the decoder layers of `model` that are of a known form ours, and watch what native calls pass over."""
    for module in model.modules():
        if isinstance(module, Watched) or digest(type(module).forward) not in LAYERS:
            continue
        children = children_of(module)
        names = set(children) & set(_MIXERS)
        if len(names) != 1 or set(children) != {*_NORMS, "mlp", *names}:
            continue
        mixer = mixer_of(module)
        if not isinstance(mixer, delta.NativeDeltaRule) and not any(k.is_ours(mixer) for k in (attention, latent)):
            continue
        if not all(isinstance(children[name], NativeRMSNorm) for name in _NORMS):
            continue
        become(module, NativeDecoderLayer, watch)
        for child in mixer.modules():
            if not isinstance(child, Watched):
                become(child, Watched, watch)
        if not isinstance(children["mlp"], Watched):
            become(children["mlp"], Watched, watch)


def mixer_of(layer: nn.Module) -> Any:
    """Its attention, or what stands in its place."""
    return next(child for name in _MIXERS if (child := layer._modules.get(name)) is not None)


def mixer_half(module: Any, block: BlockSpec | None, dtype: torch.dtype) -> decode.MixerHalf | None:
    """The first native call of a layer; None where somebody hears of its modules or they are not as they were."""
    norms = [norm_of(module._modules[name], dtype) for name in _NORMS]
    before, after = norms
    if module.training or before is None or after is None:
        return None
    if not all(is_unhooked(module._modules[name]) for name in _NORMS):
        return None
    mixer = mixer_of(module)
    if isinstance(mixer, delta.NativeDeltaRule):
        built: decode.Mixer | None = mixer.__dict__["fate_native"]
    else:
        kind = attention if digest(own_class(mixer).forward) in ATTENTIONS else latent
        built = kind.build(mixer, dtype)
    if built is None or built.hidden != before.weight.shape[0]:
        return None
    return decode.MixerHalf(before, built, after, None if block is None else block.router)
