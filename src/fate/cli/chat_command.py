"""`fate chat`: a conversation, streaming. Answers go to standard output, everything else to standard error."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fate.cli import options
from fate.cli.output import byte_progress, err, print_error, print_table, print_words
from fate.errors import UsageError
from fate.load import ensure_store, load, load_tokenizer, print_plan, read_ahead
from fate.plan.budget import MemoryPlan
from fate.systems import EXACT, System
from fate.units import format_bytes

if TYPE_CHECKING:
    from fate.cli.conversation import Conversation
    from fate.cli.generation import Generation

_HELP = """\
/stats   how the last answer and the whole session went
/reset   forget what was said
/help    this list
/exit    leave, as Ctrl-D does
Ctrl-C   stop the answer; twice, or here: leave"""


def register(app: typer.Typer) -> None:
    app.command("chat", epilog="Example: fate chat assets/mini-moe --experts 25%")(chat)


def chat(
    model: options.Model,
    memory: options.Memory = None,
    experts: options.Experts = None,
    system: options.SystemName = EXACT,
    system_prompt: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: options.MaxNewTokens = 512,
    max_context: options.MaxContext = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
) -> None:
    """Talk with MODEL inside a memory budget; lines of standard input where it is no terminal."""
    options.check_text("the system prompt", system_prompt or "")
    options.check_sampling(temperature, top_p, repetition_penalty)
    options.check_limits(memory, experts, system)
    with read_ahead(model, memory) as dense:
        import torch

        from fate.cli.conversation import Conversation, Prompts
        from fate.cli.generation import Sampling

        with byte_progress() as bar:
            store = ensure_store(model, bar, trust_remote_code)
        prompts = Prompts(load_tokenizer(store), system_prompt)

        def on_plan(plan: MemoryPlan, chosen: System) -> None:
            prompts.check_fits(plan.envelope.max_context, max_new_tokens)
            if not quiet:
                print_plan(plan, chosen)

        limits: dict[str, Any] = {"memory": memory, "experts": experts, "max_context": max_context}
        limits["trust_remote_code"] = trust_remote_code
        loaded = load(store, system=system, on_plan=on_plan, dense=dense, **limits)
    with loaded:
        if seed is not None:
            torch.manual_seed(seed)
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty)
        _talk(Conversation(loaded, prompts, sampling, _notice), quiet)


def _talk(conversation: Conversation, quiet: bool) -> None:
    """Until the input ends."""
    watched = sys.stdin.isatty()
    if watched and not quiet:
        err.print("/help lists the commands, Ctrl-D leaves", style="dim")
    for line in _lines(watched):
        if line.startswith("/"):
            if line.strip() == "/exit":
                return
            _obey(line.strip(), conversation)
        elif line.strip():
            try:
                options.check_text("the message", line)
                generation = conversation.ask(line.strip())
            except UsageError as error:  # of this message; the conversation goes on
                print_error(str(error))
                continue
            if generation.interrupted:
                _notice("stopped" if generation.new_tokens else "stopped before the first word: not asked")


def _lines(watched: bool) -> Iterator[str]:
    """What is typed, until Ctrl-D or Ctrl-C; no prompt where no one watches."""
    if watched:
        with suppress(ImportError):
            import readline  # noqa: F401  # gives `input` a history and keys that move
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are refused with their line
    while True:
        try:
            if watched and not sys.stdout.isatty():
                err.print("> ", end="")  # `input` would write it among the answers
            yield input("> " if watched and sys.stdout.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            if watched:
                err.print()
            return


def _obey(command: str, conversation: Conversation) -> None:
    if command == "/help":
        err.print(_HELP)
    elif command == "/reset":
        conversation.reset()
        _notice("forgotten: everything that was said")
    elif command == "/stats":
        _print_stats(conversation)
    else:
        print_error(f"{command} is no command: /help lists them; a message that begins with / needs a space before it")


def _notice(text: str) -> None:
    print_words(err, text, style="dim")


def _print_stats(conversation: Conversation) -> None:
    if not conversation.generations:
        _notice("nothing was answered yet")
        return
    columns = (conversation.generations[-1], conversation.total())
    table = Table("", "last answer", "session", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cell in _CELLS.items():
        table.add_row(name, *(cell(one) for one in columns))
    print_table(err, table)


def _rate(one: Generation) -> str:
    return f"{one.decode_tokens_per_s:.1f}" if one.decode_tokens_per_s else "-"


_CELLS: dict[str, Callable[[Generation], str]] = {
    "prompt tokens": lambda one: f"{one.prompt_tokens}",
    "of these computed before": lambda one: f"{one.reused_tokens}",
    "new tokens": lambda one: f"{one.new_tokens}",
    "TTFT": lambda one: f"{one.ttft_s:.2f} s" if one.ttft_s is not None else "-",
    "tok/s": _rate,
    "hit rate": lambda one: f"{one.stats.decode.hit_rate:.1%}",
    "read per token": lambda one: format_bytes(one.bytes_per_token),
    "stall": lambda one: f"{one.stats.decode.stall_share:.1%}",
}
