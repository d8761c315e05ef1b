"""The training loop: shards of a batch on threads, Muon and AdamW, cosine schedule, checkpoints that resume to the bit.

On a CPU each core runs a shard of the batch with torch on one thread: the operations of so small a model are too short
for several threads to share one, and a core that is taken away then delays nobody but itself.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from balance import LayerBalance
from muon import StackedMuon
from tokens import Sequences
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recipe:
    """sequences: a step, over all shards. balance: weight of each layer's balance loss. Learning rates are peaks."""

    steps: int = 1800
    sequences: int = 32
    length: int = 256
    muon_lr: float = 0.005
    adam_lr: float = 7.5e-4
    weight_decay: float = 0.05
    warmup: int = 60
    final_lr: float = 0.02
    balance: float = 0.01
    clip: float = 1.0
    seed: int = 0

    def lr_factor(self, step: int) -> float:
        """Linear to 1 over `warmup` steps, then half a cosine down to `final_lr` at the last."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Report:
    """One step: mean loss in nats a token, mean balance loss a layer, seconds."""

    step: int
    loss: float
    balance: float
    seconds: float


class Training:
    """`run` trains `model` (float32, on its device; products in `product_dtype`) from `step` to the recipe's end."""

    def __init__(self, model: PreTrainedModel, sequences: Sequences, recipe: Recipe, shards: int) -> None:
        if recipe.sequences % shards:
            raise ValueError(f"{recipe.sequences} sequences cannot be shared by {shards} shards: choose a multiple")
        self.step = 0
        self._model, self._sequences, self._recipe = model.train(), sequences, recipe
        self._balance = LayerBalance(model)
        self._params = list(model.parameters())
        self._shards = shards
        self._products = product_dtype(model.device.type)
        self._adam, self._muon = _optimizers(model, recipe, shards, self._products)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self._adam, *self._muon]

    def run(self, on_step: Callable[[Report], None]) -> None:
        """on_step is called after each step, and may save."""
        with _shard_threads(self._shards) as pool:
            while self.step < self._recipe.steps:
                start = time.perf_counter()
                loss, balance = self._one_step(pool)
                self.step += 1
                on_step(Report(self.step, loss, balance, time.perf_counter() - start))

    def _one_step(self, pool: ThreadPoolExecutor) -> tuple[float, float]:
        recipe = self._recipe
        batch = self._sequences.batch(self.step * recipe.sequences, recipe.sequences).to(self._model.device)
        results = list(pool.map(self._gradients, batch.chunk(self._shards)))
        losses, balances, (grads, *others) = zip(*results)
        for more in others:
            torch._foreach_add_(grads, more)
        torch._foreach_div_(grads, len(results))
        for param, grad in zip(self._params, grads):
            param.grad = grad
        torch.nn.utils.clip_grad_norm_(self._params, recipe.clip)
        for optimizer, peaks in zip(self._optimizers, self._peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * recipe.lr_factor(self.step)
        self._adam.step()
        list(pool.map(lambda muon: muon.step(), self._muon))
        return sum(losses) / len(results), sum(balances) / len(results)

    def _gradients(self, ids: Tensor) -> tuple[float, float, list[Tensor]]:
        """ids [sequences, length] -> loss, balance, and a gradient for each parameter."""
        device = ids.device.type
        half = torch.autocast(device, torch.bfloat16, self._products == torch.bfloat16, cache_enabled=False)
        with self._balance.listening() as balances, half:
            logits = self._model(ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        balance = torch.stack(balances)
        grads = torch.autograd.grad(loss + self._recipe.balance * balance.sum(), self._params)
        return loss.item(), balance.mean().item(), list(grads)

    def save(self, path: Path) -> None:
        """Everything a run needs to go on, whole or not at all."""
        state = {
            "step": self.step,
            "recipe": self._kept(),
            "model": self._model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def _kept(self) -> dict[str, object]:
        """What a run that goes on must have in common with what it goes on from."""
        return {name: value for name, value in asdict(self._recipe).items() if name != "steps"} | {
            "shards": self._shards,
            "repeats": self._sequences.repeats,
        }

    def resume(self, path: Path) -> None:
        """Go on where `save` left off; only the number of steps may have changed. Raises ValueError."""
        state = torch.load(path, map_location=self._model.device)
        for name, value in self._kept().items():
            if (saved := state["recipe"].get(name)) != value:
                raise ValueError(f"it was saved with {name}={saved}, not {value}: give the same, or another --output")
        self._model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step = state["step"]


def product_dtype(device: str) -> torch.dtype:
    """bfloat16; on CPUs but x86 with instructions for it float32: emulated, bfloat16 takes ten times as long."""
    if device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def _optimizers(
    model: PreTrainedModel, recipe: Recipe, shards: int, products: torch.dtype
) -> tuple[torch.optim.AdamW, list[StackedMuon]]:
    """AdamW, and Muon once a shard, each with its share of the matrices."""
    matrices: list[list[dict[str, object]]] = [[] for _ in range(shards)]
    decayed, others = [], []
    for name, param in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            matrices[len(decayed) % shards].append({"params": [param], "split": 2})
            decayed.append(param)
        elif name.endswith(("_proj.weight", "experts.down_proj")):
            matrices[len(decayed) % shards].append({"params": [param]})
            decayed.append(param)
        else:
            others.append(param)  # embeddings, norms, biases, routers, the shared expert's gate
    adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    how = {"lr": recipe.muon_lr, "weight_decay": recipe.weight_decay, "products": products}
    return adam, [StackedMuon(groups, **how) for groups in matrices]


@contextmanager
def _shard_threads(shards: int) -> Iterator[ThreadPoolExecutor]:
    """Threads on each of which torch runs alone."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(shards, initializer=lambda: torch.set_num_threads(1)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(threads)
