"""One family put to the proof: its tiny checkpoint converted, loaded so that experts are evicted, and compared with
what transformers' own implementation says."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

import fate
from fate.convert import convert
from fate.engine.session import FateModel
from fate.kernels import ExpertActivation
from fate.models.activation import recognise
from fate.models.adapter import MoELayer, build_meta_model, find_moe_layers
from fate.models.adapters import adapt
from fate.models.adapters.stacked import StackedExperts
from fate.models.auto import auto_class
from sweep.checkpoints import dequantize_experts, save_checkpoint
from sweep.discovery import Family
from sweep.tiny_configs import tiny_config

RAW_BOUND = 2e-5  # relative, of the worst token: sums in another order
PACKED_BOUND = 0.05  # of the median token (one may be routed elsewhere), against the same weights dequantized
INT4_BOUND = 0.6  # of the median token, against the weights as they were: random models amplify what rounding does
PROMPT, DECODED = 24, 12


@dataclass
class Outcome:
    """What was found of one family. reason: why it fails; empty if it passes.

    raw_error: of fp32 records; packed_error: of INT4 records against transformers on the dequantized weights;
    int4_error: of INT4 records and 8-bit dense weights against the checkpoint. All relative, of logits. same_bits:
    whether INT4 logits are the same with the fewest experts in memory and with all. native: what of a
    layer decodes by native calls. activations: what the kernels
    compute in its layers; "its own code": none of theirs.
    """

    family: str
    model_type: str
    auto: str = ""
    layers: int = 0
    raw_error: float | None = None
    packed_error: float | None = None
    int4_error: float | None = None
    same_text: bool | None = None
    same_bits: bool | None = None
    recall: float | None = None
    native: str = ""
    activations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason


def check_family(family: Family) -> Outcome:
    """Never raises: a family that cannot be shown to work says why in `reason`."""
    outcome = Outcome(family.name, family.model_type)
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure(family, outcome, Path(folder))
        outcome.reason = _reason(outcome)
    except Exception as error:  # whatever goes wrong is a finding about this family
        lines = str(error).strip().splitlines() or [""]
        outcome.reason = f"{type(error).__name__}: {lines[0]}"
    return outcome


def measure(family: Family, outcome: Outcome, folder: Path) -> None:
    """Fill in `outcome`, in the scratch directory `folder`."""
    checkpoint = save_checkpoint(tiny_config(family), folder / "checkpoint")
    config = AutoConfig.from_pretrained(checkpoint)
    auto = auto_class(config)
    outcome.auto = auto.__name__
    reference = auto.from_pretrained(checkpoint, experts_implementation="eager").eval()
    bare = build_meta_model(config)
    layers = find_moe_layers(bare)
    outcome.notes = _notes(layers)
    outcome.activations = sorted({_activation(recognise(layer.experts)) for layer in layers})
    adapted = any(isinstance(layer.experts, StackedExperts) for layer in layers)
    if adapted:
        outcome.notes = ["adapter", *outcome.notes, *filter(None, [adapt(bare).note])]
    expected, text = _logits(reference), _text(reference)
    spread = expected.std(0).mean().item() / expected.abs().mean().item()
    assert spread > 0.05, f"the tiny model says the same of every token (spread {spread:.3f})"

    with _load(convert(checkpoint, folder / "raw", expert_bits=32, dense_bits=16)) as model:
        outcome.raw_error = _relative(_logits(model), expected).max().item()
        stats = model.fate.stats().total
        again = stats.accesses - stats.hits - stats.first_accesses
        assert stats.evictions or again > 0, "every expert stayed in memory"
        outcome.recall = stats.recalled / stats.asked if stats.asked else None
        outcome.layers = len(model.fate.layer_stats())
        outcome.same_text = text is None or torch.equal(_text(model), text)

    default = convert(checkpoint, folder / "default")
    with _load(default) as model:
        few = _logits(model)
    with _load(default, experts="100%") as model:
        outcome.same_bits = torch.equal(_logits(model), few)
        outcome.native = model.fate.native
    outcome.int4_error = _relative(few, expected).median().item()
    if adapted:  # transformers' own modules cannot take the dequantized matrices
        return
    packed = convert(checkpoint, folder / "packed", dense_bits=16)
    dequantize_experts(reference, packed)
    with _load(packed) as model:
        outcome.packed_error = _relative(_logits(model), _logits(reference)).median().item()


def _reason(outcome: Outcome) -> str:
    bounds = [
        ("fp32 records", outcome.raw_error, RAW_BOUND),
        ("INT4 records, against the dequantized weights,", outcome.packed_error, PACKED_BOUND),
        ("INT4 records, against the checkpoint,", outcome.int4_error, INT4_BOUND),
    ]
    for what, error, bound in bounds:
        if error is not None and not error < bound:
            return f"logits of {what} differ by {error}, the bound is {bound}"
    if not outcome.same_bits:
        return "other bits with all experts in memory"
    return "" if outcome.same_text else "greedy text differs"


def _load(store: Path, experts: int | str = 1) -> FateModel:
    """With the fewest experts in memory that a plan allows, if not told otherwise."""
    return fate.load(store, experts=experts, on_plan=lambda plan, system: None)


def _notes(layers: list[MoELayer]) -> list[str]:
    """What is special about the family's experts."""
    module: Any = layers[0].experts
    found = {
        "no gate projection": not module.has_gate,
        "biases": module.has_bias,
        "transposed weights": module.is_transposed,
        "gate and up interleaved": not module.is_concatenated,
        "norm after each expert": module.has_post_expert_norm,
        "weights shared between encoder and decoder": any(layer.aliases for layer in layers),
        "no router that can be asked": any(layer.router is None for layer in layers),
    }
    return [note for note, holds in found.items() if holds]


def _activation(form: ExpertActivation | None) -> str:
    if form is None:
        return "its own code"
    names = {"silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU (tanh)", "relu": "ReLU", "relu2": "ReLU²"}
    if form.kind == "silu_softcap":
        return "SwiGLU, softcapped"
    name = "SwiGLU" if form.gated and form.kind == "silu" else names[form.kind]
    bounded = min(form.gate_max, form.act_max, form.up_limit) < float("inf")
    scaled = f", alpha {form.alpha:g}" if form.alpha != 1 else ""
    return name + scaled + (", clamped" if bounded else "") + (", up + 1" if form.up_offset else "")


def _logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits [tokens, classes] of a prompt and of tokens fed one at a time after it, where the model has a cache."""
    ids = torch.randint(3, 200, (1, PROMPT + DECODED), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(7)  # a diffusion model draws its canvas
    with torch.no_grad():
        if not model.can_generate():
            return torch.cat([model(part).logits[0] for part in (ids[:, :PROMPT], ids[:, DECODED:])]).float()
        if model.config.is_encoder_decoder:
            return _translated(model, ids[:, :PROMPT], ids[:, PROMPT:])
        out = model(ids[:, :PROMPT], use_cache=True)
        rows, cache = [out.logits[0]], out.past_key_values
        for at in range(PROMPT, PROMPT + DECODED):
            out = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0])
    return torch.cat(rows).float()


def _translated(model: PreTrainedModel, ids: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """The same of an encoder-decoder model: `ids` are encoded, `decoded` fed to the decoder one token at a time."""
    rows: list[torch.Tensor] = []
    cache, encoded = None, model.get_encoder()(ids)
    for at in range(decoded.shape[1]):
        token = decoded[:, at : at + 1]
        out = model(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0])
    return torch.cat(rows).float()


def _text(model: PreTrainedModel) -> torch.Tensor | None:
    """What greedy decoding says after a prompt; None for a classifier."""
    if not model.can_generate():
        return None
    ids = torch.randint(3, 200, (1, PROMPT), generator=torch.Generator().manual_seed(11))
    torch.manual_seed(7)
    said = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    return said if isinstance(said, torch.Tensor) else said.sequences


def _relative(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (got - expected).norm(dim=-1) / expected.norm(dim=-1)
