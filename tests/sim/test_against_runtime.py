"""The gate of the simulator: on the trace of a real run it counts what the run counted, layer by layer."""

import pytest
import torch

import fate
from engine_support import stepwise_logits
from fate.cache import POLICIES
from fate.sim.belady import belady_misses
from fate.sim.curves import lru_miss_curves
from fate.systems import System
from fate.trace import RoutingTrace
from replay_oracle import CacheCounts, replay
from tiny import tiny_store


def counted(stats):
    """Of a layer's statistics, what the simulator knows too."""
    return CacheCounts(stats.accesses, stats.hits, stats.first_accesses, stats.evictions)


def run(policy, experts, allocation="uniform"):
    """Two requests of a tiny model: (trace, capacities, statistics of each layer)."""
    store = tiny_store("qwen2_moe", 32, 16)
    system = System(f"{policy}-on-demand", policy=policy, allocation=allocation)
    with fate.load(store, experts=experts, system=system) as model, model.fate.record_routing("tiny") as recorder:
        for seed in (3, 4):
            ids = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(seed))
            stepwise_logits(model, ids, prompt_tokens=10)
        return recorder.trace(), model.fate.engine.residency.cache.capacities, model.fate.layer_stats()


@pytest.mark.parametrize(
    "policy, experts", [*((name, "50%") for name in POLICIES.names()), ("lru", 1), ("arc", 1), ("lrfu", "75%")]
)
def test_replay_counts_what_the_run_counted(tmp_path, policy, experts):
    trace, capacities, layer_stats = run(policy, experts)
    trace.write(tmp_path / "run.jsonl.gz")
    result = replay(RoutingTrace.read(tmp_path / "run.jsonl.gz"), capacities, POLICIES.get(policy))
    assert list(result.prefill) == [counted(stats.prefill) for stats in layer_stats]
    assert list(result.decode) == [counted(stats.decode) for stats in layer_stats]
    assert trace.num_requests == 2
    assert [step.tokens for step in trace.steps] == [10, *[1] * 20] * 2
    assert all(
        layer.hits > 0 and layer.misses > layer.first_accesses and layer.evictions > 0 for layer in result.layers
    )


def test_the_curve_and_the_bound_speak_of_the_same_run():
    trace, capacities, layer_stats = run("lru", "75%", allocation="shallow")
    misses = [stats.total.misses for stats in layer_stats]
    assert len(set(capacities)) > 1
    assert [curve[slots] for curve, slots in zip(lru_miss_curves(trace), capacities, strict=True)] == misses
    assert all(bound <= count for bound, count in zip(belady_misses(trace, capacities), misses, strict=True))
