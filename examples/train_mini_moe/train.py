"""Train the embedded model: `python examples/train_mini_moe/train.py --corpus FOLDER --output DIR`.

Corpus, tokenizer, Qwen2-MoE in Qwen1.5-MoE's routing geometry, training, held-out loss, routing statistics. Stop it
when you like: the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import experts
import torch
import typer
from corpus import read_corpus
from report import measure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokens import Sequences, load_tokenizer, train_tokenizer
from training import Recipe, Report, Training
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen2MoeConfig

SAVE_EVERY = 100  # steps
CHECKPOINT = "checkpoint.pt"
LOG = "training.jsonl"
VOCABULARY = 4096
SMOKE = Recipe(steps=8, sequences=4, length=64, warmup=2, muon_lr=0.02, adam_lr=3e-3)


def geometry(layers: int, vocab_size: int) -> Qwen2MoeConfig:
    """60 experts, top-4 without renormalisation, a shared expert: Qwen1.5-MoE-A2.7B's routing, a small body."""
    return Qwen2MoeConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=256,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=6,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def train(
    corpus: Annotated[Path, typer.Option(help="Folder of .txt, .jsonl (question, answer) and .py files.")],
    output: Annotated[Path, typer.Option(help="Where the model goes, and checkpoints meanwhile.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps in all, the cosine's length.")] = Recipe.steps,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = Recipe.sequences,
    length: Annotated[int, typer.Option(min=8, help="Tokens a sequence.")] = Recipe.length,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers; 24 is Qwen1.5-MoE's depth.")] = 16,
    tokenizer: Annotated[Path | None, typer.Option(help="Take this folder's tokenizer; else one is trained.")] = None,
    init: Annotated[Path | None, typer.Option(help="Go on from this checkpoint's weights, with its tokenizer.")] = None,
    peak: Annotated[float, typer.Option(min=0.01, help="Factor on the peak learning rates; less to go on.")] = 1.0,
    repeat: Annotated[
        list[str] | None,
        typer.Option(help='"DOMAIN=N": an epoch has that domain N times; "word problems", "prose", "Python".'),
    ] = None,
    standard_library: Annotated[bool, typer.Option(help="Add the Python standard library's sources.")] = True,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that share a batch; else as many as there are cores and divide it."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of weights and of the documents' order.")] = 0,
    smoke: Annotated[bool, typer.Option("--smoke", help="A minute's run that shows that everything works.")] = False,
) -> None:
    """Train, measure, and write a checkpoint in hub layout."""
    rates = {"muon_lr": peak * Recipe.muon_lr, "adam_lr": peak * Recipe.adam_lr}
    recipe = Recipe(steps=steps, sequences=sequences, length=length, seed=seed, **rates)
    if smoke:
        recipe, layers = replace(SMOKE, seed=seed), min(layers, 2)
    try:
        text = read_corpus(corpus, standard_library=standard_library)
        text.repeat(repeat or [])
        made = init or tokenizer or (output if (output / "tokenizer.json").exists() else None)
        encoder = load_tokenizer(made) if made else train_tokenizer(text, VOCABULARY)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    output.mkdir(parents=True, exist_ok=True)
    encoder.save_pretrained(output)

    experts.register()
    torch.manual_seed(seed)
    how = {"experts_implementation": experts.NAME, "dtype": torch.float32}
    if init:
        model = AutoModelForCausalLM.from_pretrained(init, **how)
    else:
        model = AutoModelForCausalLM.from_config(geometry(layers, len(encoder)), **how)
    model.to(device)
    cores = 1 if device != "cpu" else os.cpu_count() or 1
    shards = shards or max(count for count in range(1, cores + 1) if recipe.sequences % count == 0)
    try:
        training = Training(model, Sequences(text, encoder, recipe.length, seed), recipe, shards)
        if (output / CHECKPOINT).exists():
            training.resume(output / CHECKPOINT)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {output}: {str(error).splitlines()[0]}") from None
    _run(training, recipe, output)
    save_model(model, output)

    settings = asdict(recipe) | {
        "repeats": text.repeats,
        "layers": model.config.num_hidden_layers,
        "shards": shards,
        "device": device,
    }
    result = {"recipe": settings} | measure(output, text, recipe.length)
    (output / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["held_out"]))


def save_model(model: PreTrainedModel, output: Path) -> None:
    """bfloat16 weights in hub layout, and how to sample from them."""
    copy = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=40, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    copy.save_pretrained(output)


def _run(training: Training, recipe: Recipe, output: Path) -> None:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=recipe.steps, completed=training.step)

        def on_step(report: Report) -> None:
            rate = recipe.sequences * recipe.length / report.seconds
            bar.update(task, advance=1, description=f"loss {report.loss:.3f}  {rate:,.0f} tokens/s")
            with (output / LOG).open("a") as log:
                print(json.dumps(asdict(report)), file=log)
            if not math.isfinite(report.loss):
                raise SystemExit(f"error: loss is {report.loss} at step {report.step}: lower the learning rates")
            if report.step % SAVE_EVERY == 0 or report.step == recipe.steps:
                training.save(output / CHECKPOINT)

        training.run(on_step)


if __name__ == "__main__":
    typer.run(train)
