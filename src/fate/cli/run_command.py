"""`fate run`: generate text, streaming, and say in one line, or layer by layer, how it went."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from fate.cli import options
from fate.cli.output import byte_progress, err, print_json, print_words
from fate.errors import EmptyPromptError
from fate.load import ensure_store, load, load_tokenizer, print_plan, read_ahead
from fate.plan.budget import MemoryPlan
from fate.systems import EXACT, System


def register(app: typer.Typer) -> None:
    app.command("run", epilog='Example: fate run assets/mini-moe "Once upon a time" --experts 25% --seed 1')(run)


def run(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    memory: options.Memory = None,
    experts: options.Experts = None,
    system: options.SystemName = EXACT,
    max_new_tokens: options.MaxNewTokens = 128,
    max_context: options.MaxContext = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say of each MoE layer where its time and bytes went.")
    ] = False,
    json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue PROMPT with MODEL inside a memory budget."""
    if not prompt:
        raise EmptyPromptError()
    options.check_text("the prompt", prompt)
    options.check_sampling(temperature, top_p, repetition_penalty)
    options.check_limits(memory, experts, system)
    with read_ahead(model, memory) as dense:
        import torch

        from fate.cli.explanation import print_explanation
        from fate.cli.generation import Sampling, TimedStreamer, generate, report, summary
        from fate.engine.generation import check_envelope
        from fate.tools.explanation import observe

        with byte_progress() as bar:
            store = ensure_store(model, bar, trust_remote_code)
        tokenizer = load_tokenizer(store)
        ids = _encode(tokenizer, prompt, chat)

        def on_plan(plan: MemoryPlan, chosen: System) -> None:
            check_envelope(plan.envelope, batch=1, tokens=1, context=ids.shape[1] + max_new_tokens)
            if not quiet:
                print_plan(plan, chosen)

        limits: dict[str, Any] = {"memory": memory, "experts": experts, "max_context": max_context}
        limits["trust_remote_code"] = trust_remote_code
        loaded = load(store, system=system, on_plan=on_plan, dense=dense, **limits)
    with loaded:
        if seed is not None:
            torch.manual_seed(seed)
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty)
        with observe(loaded.fate) if explain else nullcontext() as observation:
            generation = generate(loaded, ids, TimedStreamer(tokenizer), sampling)
        if generation.interrupted:
            raise KeyboardInterrupt
        figures = report(loaded, generation)
        explanation = observation.explain() if observation is not None else None
    if not quiet:
        for note in generation.notes:
            print_words(err, note, style="dim")
        print_words(err, summary(generation), style="dim")
    if explanation is not None:
        figures["explain"] = explanation.to_json()
        if not quiet:
            print_explanation(err, explanation)
    if json:
        print_json(figures)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Token ids [1, tokens]."""
    import torch

    from fate.cli.generation import encode_chat

    if chat:
        return torch.tensor([encode_chat(tokenizer, [{"role": "user", "content": prompt}], "leave out --chat")])
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise EmptyPromptError()
    return ids
