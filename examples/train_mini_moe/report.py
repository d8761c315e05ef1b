"""What a trained model is worth: held-out loss by domain, and the routing statistics that caches and prefetching feel.

`python examples/train_mini_moe/report.py MODEL [MODEL ...] --corpus FOLDER` measures checkpoints in hub layout, each
with its own tokenizer, on the same held-out documents. Losses are transformers' own; routing is recorded by Fate from a
store with the weights as they are, and replayed through its caches.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import experts
import torch
import typer
from corpus import Corpus, read_corpus
from rich import print_json
from tokens import END, load_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import fate
from fate.cache import POLICIES
from fate.convert import convert
from fate.engine.session import FateModel
from fate.sim.belady import belady_misses
from fate.tools.evaluate import perplexity
from fate.tools.similarity import measure_similarity
from fate.trace import RoutingTrace

SHARES = (0.25, 0.5, 0.75)
LOSS_TOKENS = 100_000  # a domain; of the shipped corpus, every held-out document
DOCUMENT_TOKENS = 4096  # a document's first: one of Python's held-out files would otherwise be half of all
ROUTING_TOKENS = 2048  # a domain; fed one by one for half as many


def measure(checkpoint: Path, corpus: Corpus, window: int) -> dict[str, Any]:
    """Loss and routing of a checkpoint on the corpus's held-out documents, in windows of `window` tokens."""
    tokenizer = load_tokenizer(checkpoint)
    ids = {domain: beginnings(tokenizer, documents) for domain, documents in corpus.held_out.items()}
    return {
        "held_out": held_out_loss(checkpoint, tokenizer, ids, window),
        "routing": routing_statistics(checkpoint, {domain: some[:ROUTING_TOKENS] for domain, some in ids.items()}),
    }


def held_out_loss(
    checkpoint: Path, tokenizer: PreTrainedTokenizerBase, ids: dict[str, Tensor], window: int
) -> dict[str, dict[str, float]]:
    """Of each domain's token ids [tokens]: nats a token, and bits a byte, which tokenizers do not change."""
    experts.register()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation=experts.NAME)
    found = {}
    for domain, tokens in ids.items():
        result = perplexity(model, tokens, window=window, chunk=window)
        num_bytes = len(tokenizer.decode(tokens).encode())
        bits = result.nats_per_token / math.log(2) * len(tokens) / num_bytes
        found[domain] = {"nats_per_token": result.nats_per_token, "bits_per_byte": bits, "tokens": result.tokens}
    return found


def routing_statistics(checkpoint: Path, ids: dict[str, Tensor]) -> dict[str, Any]:
    """Means over domains. Of each layer: what `fate inspect --text` says. Hit rates: caches per layer that hold a
    share of the experts, tokens fed one by one."""
    with tempfile.TemporaryDirectory() as folder:
        store = convert(checkpoint, Path(folder) / "store", expert_bits=16, dense_bits=16)
        with fate.load(store, system="load-on-demand", max_context=512, on_plan=lambda *_: None) as model:
            similar = [measure_similarity(model, tokens) for tokens in ids.values()]
            traces = [_decode_trace(model, tokens[: len(tokens) // 2]) for tokens in ids.values()]
    fields = ("cosine_to_next", "recall_at_k", "recall_at_2k", "load_balance")
    layers = [{name: _mean([getattr(layer, name) for layer in same]) for name in fields} for same in zip(*similar)]
    return {
        "layers": layers,
        "mean": {name: _mean([layer[name] for layer in layers]) for name in fields},
        "hit_rates": {f"{share:.0%}": _hit_rates(traces, share) for share in SHARES},
    }


def _hit_rates(traces: list[RoutingTrace], share: float) -> dict[str, float]:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
    from replay_oracle import replay  # the checkout's own simulator of caches

    found: dict[str, float] = {}
    capacities = [round(share * experts) for experts in traces[0].meta.num_experts]
    for policy in ("lru", "arc"):
        results = [replay(trace, capacities, POLICIES.get(policy)).total for trace in traces]
        found[policy] = sum(result.hits for result in results) / sum(result.accesses for result in results)
    accesses = sum(len(layer) for trace in traces for step in trace.steps for layer in step.layers)
    found["belady"] = 1 - sum(sum(belady_misses(trace, capacities)) for trace in traces) / accesses
    return found


@torch.inference_mode()
def _decode_trace(model: FateModel, ids: Tensor) -> RoutingTrace:
    """Routing of token ids [tokens], fed one by one in windows of the plan's context."""
    with model.fate.record_routing() as recorder:
        for piece in ids.split(model.fate.envelope.max_context):
            cache = model.fate.new_cache(model.config)
            for token in piece.split(1):
                model(token[None], past_key_values=cache, use_cache=True)
    return recorder.trace()


def beginnings(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor:
    """Token ids [at most LOSS_TOKENS]: the first of each document, each begun by END."""
    encoded = tokenizer([END + document for document in documents], verbose=False)["input_ids"]
    return torch.tensor([token for document in encoded for token in document[:DOCUMENT_TOKENS]])[:LOSS_TOKENS]


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def report(
    models: Annotated[list[Path], typer.Argument(help="Checkpoints in hub layout.")],
    corpus: Annotated[Path, typer.Option(help="The folder that was trained on.")],
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    output: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
) -> None:
    """Held-out loss and routing of checkpoints, on the same documents."""
    try:
        for model in models:
            load_tokenizer(model)  # before minutes are spent on another
        text = read_corpus(corpus)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    content = json.dumps({str(model): measure(model, text, length) for model in models}, indent=1)
    if output is not None:
        output.write_text(content + "\n")
    print_json(content)


if __name__ == "__main__":
    typer.run(report)
