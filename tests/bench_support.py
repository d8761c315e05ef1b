"""What the benchmarks' tests share: requests of random tokens, and runs of made-up figures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fate.bench.comparison import Comparison, Link, Workload
from fate.bench.limits import Compute
from fate.bench.prompts import Request
from fate.bench.summary import Phase, Run
from fate.bench.systems import Cell, Measured
from fate.core import StepStats
from fate.engine.session import RunStats

GB = 10**9
COMPUTE = Compute(
    prefill_s_per_token=0.001, decode_s_per_token=0.1, layer_s=0.01, record_bytes=20_000_000, resident=True
)


def request(seed: int, prompt_tokens: int = 12, new_tokens: int = 4) -> Request:
    """Bytes, as the tiny models' tokenizer has them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (1, prompt_tokens + new_tokens), generator=generator)
    return Request(f"file {seed}", ids, prompt_tokens)


def workload(recorded: int = 2) -> Workload:
    return Workload([request(0)], [request(1 + at) for at in range(recorded)])


def run(decode_s: float, prefill_s: float = 1.0, read: int = 0, hits: int = 5, notes: Sequence[str] = ()) -> Run:
    """10 tokens of prompt, 4 decoded; `read` bytes in each phase; 10 accesses with so many hits, all in one layer."""
    stats = StepStats(tokens=4, forwards=4, accesses=10, hits=hits, demand_bytes=read, total_s=decode_s)
    phases = Phase(prefill_s, 10, stats), Phase(decode_s, 4, stats)
    return Run(*phases, prefill_s, (RunStats(stats, stats), RunStats(stats, stats)), 12, tuple(notes))


def measured() -> tuple[Comparison, Measured]:
    """Two links, two budgets, three systems, of which fate is twice as fast as load-on-demand, thrice at 50%."""
    comparison = Comparison(("load-on-demand", "cross-layer", "fate"), ("25%", "50%"), ("disk", "1GB/s"), repeats=2)
    cells = []
    for link in (Link("disk", None), Link("1GB/s", 1e9)):
        for experts, factor in (("25%", 2.0), ("50%", 3.0)):
            seconds = {"load-on-demand": 1.2, "cross-layer": 0.8, "fate": 1.2 / factor}
            runs = {name: [run(s, s, read=GB // 10), run(2 * s, s, read=GB // 10)] for name, s in seconds.items()}
            cells.append(Cell(link, experts, runs, minimum={"prefill": 1e7, "decode": 2e7}))
    return comparison, Measured(num_experts=24, compute=COMPUTE, disk_bytes_per_s=2e9, cells=cells)
