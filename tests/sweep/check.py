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
from fate.models.auto import auto_class
from sweep.checkpoints import save_checkpoint
from sweep.discovery import Family
from sweep.tiny_configs import tiny_config

RAW_BOUND = 2e-5  # relative, of the worst token: sums in another order
INT4_BOUND = 0.15  # relative, of the median token: a token may be routed elsewhere
PROMPT, DECODED = 24, 6


@dataclass
class Outcome:
    """What was found of one family. reason: why it fails; empty if it passes."""

    family: str
    model_type: str
    auto: str = ""
    layers: int = 0
    raw_error: float | None = None
    int4_error: float | None = None
    recall: float | None = None
    early: bool = False
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
            _check(family, outcome, Path(folder))
    except Exception as error:  # whatever goes wrong is a finding about this family
        lines = str(error).strip().splitlines() or [""]
        outcome.reason = f"{type(error).__name__}: {lines[0]}"
    return outcome


def _check(family: Family, outcome: Outcome, folder: Path) -> None:
    checkpoint = save_checkpoint(tiny_config(family), folder / "checkpoint")
    config = AutoConfig.from_pretrained(checkpoint)
    auto = auto_class(config)
    outcome.auto = auto.__name__
    reference = auto.from_pretrained(checkpoint, experts_implementation="eager").eval()
    expected = _outputs(reference)
    store = convert(checkpoint, folder / "raw", expert_bits=32, dense_bits=16)
    with fate.load(store, experts=1, on_plan=_quiet) as model:
        got = _outputs(model)
        stats = model.fate.stats().total
        _describe(model, outcome)
    outcome.recall = stats.recalled / stats.asked if stats.asked else None
    outcome.raw_error = _relative(got, expected).max().item()
    with fate.load(convert(checkpoint, folder / "int4", dense_bits=16), experts=1, on_plan=_quiet) as model:
        outcome.int4_error = _relative(_outputs(model), expected).median().item()
    spread = expected.std(0).mean().item() / expected.abs().mean().item()
    if not stats.evictions:
        outcome.reason = "no expert was ever evicted"
    elif spread < 0.05:
        outcome.reason = f"the model says nothing (spread {spread:.3f})"
    elif not outcome.raw_error < RAW_BOUND:
        outcome.reason = f"raw records differ by {outcome.raw_error:.1e}"
    elif not outcome.int4_error < INT4_BOUND:
        outcome.reason = f"INT4 differs by {outcome.int4_error:.2f}"


def _describe(model: Any, outcome: Outcome) -> None:
    outcome.layers = len(model.fate.layer_stats())
    outcome.early = model.fate._assembly.routes_early


def _outputs(model: PreTrainedModel) -> torch.Tensor:
    """Logits [tokens, classes] of a prompt and of tokens fed one at a time after it, where the model has a cache."""
    ids = torch.randint(3, 200, (1, PROMPT + DECODED), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(7)  # a diffusion model draws its canvas
    with torch.no_grad():
        out = model(ids[:, :PROMPT], use_cache=True) if model.can_generate() else model(ids)
        rows, cache = [out.logits[0]], getattr(out, "past_key_values", None)
        for at in range(PROMPT, PROMPT + DECODED if cache is not None else PROMPT):
            out = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0])
    return torch.cat(rows).float()


def _relative(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (got - expected).norm(dim=-1) / expected.norm(dim=-1)


def _quiet(plan: object, system: object) -> None:
    """Sixty plans are no reading."""
