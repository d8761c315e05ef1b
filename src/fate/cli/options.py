"""Options that several commands share, defined once."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from fate.errors import UsageError
from fate.systems import resolve_system, system_names
from fate.units import parse_experts, parse_memory

Model = Annotated[str, typer.Argument(help="A store, a checkpoint directory, a GGUF file or a hub id.")]
Memory = Annotated[
    str | None,
    typer.Option(help="Peak resident memory of the whole process, e.g. 6GiB. Default: what is free less a margin."),
]
Experts = Annotated[
    str | None, typer.Option(help="At most this share (25%) or number of all experts in memory, whatever the budget.")
]
SystemName = Annotated[str, typer.Option("--system", help=f"One of: {', '.join(system_names())}.")]
MaxContext = Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and generation the plan covers.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")]
Temperature = Annotated[float, typer.Option(help="0 picks the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens with this probability in all.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from so many tokens; 0: all.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens already used become less likely.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampler.")]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code of a model that brings its own.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No plan, no summary.")]


def check_limits(memory: str | None, experts: str | None, *systems: str) -> None:
    """Refuse what `fate.load` would, before the minutes that converting a checkpoint may take."""
    if memory is not None:
        parse_memory(memory)
    parse_experts(experts, total=1)
    for system in systems:
        resolve_system(system)


def check_sampling(temperature: float, top_p: float, repetition_penalty: float) -> None:
    """Refuse what would only fail, or give nonsense, once the model is loaded."""
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature {temperature} is not valid: give 0 (the likeliest token) or a positive number")
    if not 0 < top_p <= 1:
        raise UsageError(f"top-p {top_p} is not valid: give a number above 0 and at most 1")
    if not 0 < repetition_penalty < math.inf:
        raise UsageError(f"repetition penalty {repetition_penalty} is not valid: give a positive number, 1 for none")


def check_text(what: str, text: str) -> None:
    """Refuse bytes of another encoding, which arrive as characters that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not UTF-8 text: write it in UTF-8") from None
