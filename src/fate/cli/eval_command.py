"""`fate eval`: perplexity on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fate.cli import options
from fate.cli.output import byte_progress, out, print_json, print_words, token_progress
from fate.load import print_plan
from fate.systems import EXACT


def register(app: typer.Typer) -> None:
    app.command("eval", epilog="Example: fate eval assets/mini-moe --text story.txt --max-tokens 4096")(evaluate)


def evaluate(
    model: options.Model,
    text: Annotated[Path, typer.Option(help="A text file (UTF-8).")],
    memory: options.Memory = None,
    experts: options.Experts = None,
    system: options.SystemName = EXACT,
    max_context: Annotated[int, typer.Option(min=2, help="Tokens of one window.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Only the first so many tokens of the text.")] = None,
    json: options.Json = False,
) -> None:
    """Perplexity of MODEL on a text, in windows that do not overlap."""
    from fate.load import ensure_store, load, load_tokenizer
    from fate.tools.evaluate import perplexity, read_text

    options.check_limits(memory, experts, system)
    content = read_text(text)
    with byte_progress() as bar:
        store = ensure_store(model, bar)
    ids = load_tokenizer(store)(content, return_tensors="pt").input_ids[0, :max_tokens]
    loading = load(store, memory=memory, experts=experts, system=system, max_context=max_context, on_plan=print_plan)
    with loading as loaded, token_progress() as bar:
        chunk = loaded.fate.envelope.max_rows_per_forward
        result = perplexity(loaded, ids, window=max_context, chunk=chunk, progress=bar)
        stats = loaded.fate.stats().total
    print_words(
        out,
        f"perplexity {result.perplexity:.4f} · {result.nats_per_token:.4f} nats/token · {result.tokens} tokens · "
        f"{result.tokens_per_s:.1f} tok/s · hit rate {stats.hit_rate:.1%}",
    )
    if json:
        print_json(
            {
                "perplexity": result.perplexity,
                "nats_per_token": result.nats_per_token,
                "tokens": result.tokens,
                "tokens_per_s": result.tokens_per_s,
                "hit_rate": stats.hit_rate,
            }
        )
