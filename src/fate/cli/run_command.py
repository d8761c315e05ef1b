"""`fate run`: generate text, streaming, and say in one line how it went."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

import typer

from fate.cli import options
from fate.cli.output import byte_progress, err, print_json, print_plan, print_words
from fate.errors import EmptyPromptError, FateError, UsageError
from fate.memory import MemoryPlan, format_bytes
from fate.systems import EXACT, System


def register(app: typer.Typer) -> None:
    app.command("run", epilog='Example: fate run assets/mini-moe "Once upon a time" --experts 25% --seed 1')(run)


def run(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    memory: options.Memory = None,
    experts: options.Experts = None,
    system: options.SystemName = EXACT,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    max_context: options.MaxContext = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="0 picks the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this probability in all.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many tokens; 0: all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already used become less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampler.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue PROMPT with MODEL inside a memory budget."""
    _check(prompt, temperature, top_p, repetition_penalty)
    options.check_limits(memory, experts, system)
    import torch

    from fate.loading import ensure_store, load, load_tokenizer
    from fate.runtime.session import check_envelope

    with byte_progress() as bar:
        store = ensure_store(model, bar)
    tokenizer = load_tokenizer(store)
    ids = _encode(tokenizer, prompt, chat)

    def on_plan(plan: MemoryPlan, chosen: System) -> None:
        check_envelope(plan.envelope, batch=1, tokens=1, context=ids.shape[1] + max_new_tokens)
        if not quiet:
            print_plan(plan, chosen)

    limits: dict[str, Any] = {"memory": memory, "experts": experts, "max_context": max_context}
    with load(store, system=system, on_plan=on_plan, **limits) as loaded:
        if seed is not None:
            torch.manual_seed(seed)
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature > 0 else {}
        streamer = _TimedStreamer(tokenizer, prompt_tokens=ids.shape[1])
        start = time.perf_counter()
        try:
            loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=streamer,
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                repetition_penalty=repetition_penalty,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **sampling,
            )
        except (KeyboardInterrupt, FateError):
            streamer.end()  # what comes next begins on a line of its own
            raise
        report = _report(loaded, streamer, start)
    if not quiet:
        print_words(err, _summary(report), style="dim")
    if json:
        print_json(report)


def _check(prompt: str, temperature: float, top_p: float, repetition_penalty: float) -> None:
    """Refuse what would only fail, or give nonsense, once the model is loaded."""
    if not prompt:
        raise EmptyPromptError()
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("the prompt is not UTF-8 text: write it in UTF-8") from None
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature {temperature} is not valid: give 0 (the likeliest token) or a positive number")
    if not 0 < top_p <= 1:
        raise UsageError(f"top-p {top_p} is not valid: give a number above 0 and at most 1")
    if not 0 < repetition_penalty < math.inf:
        raise UsageError(f"repetition penalty {repetition_penalty} is not valid: give a positive number, 1 for none")


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    elif tokenizer.chat_template is None:
        raise UsageError("this model has no chat template: leave out --chat")
    else:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    if ids.shape[1] == 0:
        raise EmptyPromptError()
    return ids


class _TimedStreamer:
    """A transformers streamer that prints text as it comes and notes when each token came."""

    def __init__(self, tokenizer: Any, prompt_tokens: int) -> None:
        from transformers import TextStreamer

        self._text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.prompt_tokens = prompt_tokens
        self.times: list[float] = []
        self._started = False

    def put(self, value: Any) -> None:
        if self._started:
            self.times.append(time.perf_counter())
        self._started = True
        self._text.put(value)

    def end(self) -> None:
        self._text.end()


def _report(model: Any, streamer: _TimedStreamer, start: float) -> dict[str, Any]:
    stats, times = model.fate.stats(), streamer.times
    decode = stats.decode
    seconds = times[-1] - times[0] if len(times) > 1 else 0.0
    return {
        "system": model.fate.system.name,
        "prompt_tokens": streamer.prompt_tokens,
        "new_tokens": len(times),
        "ttft_s": times[0] - start if times else None,
        "decode_tokens_per_s": (len(times) - 1) / seconds if seconds else None,
        "hit_rate": decode.hit_rate,
        "coverage": decode.coverage,
        "bytes_per_token": decode.bytes_moved / decode.tokens if decode.tokens else 0.0,
        "wasted_bytes_per_token": decode.wasted_bytes / decode.tokens if decode.tokens else 0.0,
        "stall_share": decode.stall_share,
        "slots": model.fate.plan.num_slots,
        "experts": model.fate.plan.needs.total_experts,
        "planned_bytes": model.fate.plan.total,
    }


def _summary(report: dict[str, Any]) -> str:
    if report["ttft_s"] is None:
        return "no token was generated"
    rate = report["decode_tokens_per_s"]
    return (
        f"{report['prompt_tokens']} + {report['new_tokens']} tokens · TTFT {report['ttft_s']:.2f} s · "
        f"{f'{rate:.1f} tok/s' if rate else 'one token'} · hit rate {report['hit_rate']:.1%} · "
        f"{format_bytes(report['bytes_per_token'])}/token read · stall {report['stall_share']:.1%}"
    )
