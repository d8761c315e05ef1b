"""The sacred gate: the same bits at every budget, policy and predictor."""

import pytest
import torch

import fate
from engine_support import stepwise_logits
from fate.cache import POLICIES
from fate.plan.budget import RUNTIME_SLACK_BYTES, make_plan
from fate.predict import PREDICTORS
from fate.systems import ORACLES, SYSTEMS, System
from tiny import tiny_store

EXACT_SYSTEMS = [SYSTEMS.get(name) for name in SYSTEMS.names() if SYSTEMS.get(name).exact]
NAMED = {(system.predictor, system.policy) for system in EXACT_SYSTEMS}
GUESSERS = [name for name in PREDICTORS.names() if not PREDICTORS.get(name).needs_future]
PAIRS = [(p, c) for p in GUESSERS for c in POLICIES.names() if (p, c) not in NAMED]
OTHER_PAIRS = [System(f"{p}+{c}", predictor=p, policy=c) for p, c in PAIRS]
BUDGETS = {"smallest": 1, "half": "50%", "full": "100%"}


def cells():
    """Every system at the smallest budget and the named ones at half; beyond, what adds a product but no new code."""
    for system in (*EXACT_SYSTEMS, *ORACLES.values(), *OTHER_PAIRS):
        for budget in BUDGETS:
            gate = (
                budget == "smallest" or (system not in OTHER_PAIRS and budget == "half") or system is EXACT_SYSTEMS[0]
            )
            marks = () if gate else pytest.mark.slow
            yield pytest.param(system, budget, marks=marks, id=f"{system.name}-{budget}")


def run(store, ids, system, experts, future=()):
    with fate.load(store, experts=experts, system=system, max_context=64) as model:
        if model.fate.engine.predictor.needs_future:
            model.fate.engine.predictor.foretell(future)
        return stepwise_logits(model, ids), model.fate.stats().total, model.fate.plan


@pytest.fixture(scope="module")
def fully_resident(mini_store, prompt):
    """Logits and routing of the fully resident run, and proof that it was one."""
    with fate.load(mini_store, system="load-on-demand") as model:
        with model.fate.record_routing() as recorder:
            stepwise_logits(model, prompt)
        before = model.fate.stats()
        logits = stepwise_logits(model, prompt)
        again = (model.fate.stats() - before).total
        assert again.misses == 0
        assert again.evictions == 0
    return logits, recorder.trace().steps


@pytest.fixture(scope="module")
def resident(fully_resident):
    return fully_resident[0]


@pytest.mark.parametrize("system, budget", list(cells()))
def test_bit_identical(mini_store, prompt, fully_resident, system, budget):
    resident, future = fully_resident
    logits, stats, plan = run(mini_store, prompt, system, BUDGETS[budget], future)
    assert torch.equal(logits, resident)
    if budget == "smallest":
        assert plan.num_slots == plan.needs.min_slots
        smallest = plan.needs.smallest - RUNTIME_SLACK_BYTES
        assert make_plan(smallest, plan.envelope, plan.needs).num_slots == plan.needs.min_slots
    if budget != "full":
        assert stats.evictions > 0 or not system.cached
        assert stats.misses > 0
        assert plan.num_slots < plan.needs.total_experts
    if system.prefetches and budget != "full":
        assert stats.prefetch_bytes > 0
        assert stats.prefetch_hits + stats.late_prefetches > 0


def test_the_gate_can_fail(mini_store, prompt, resident):
    """A lossy system does not pass for exact."""
    logits, _, _ = run(mini_store, prompt, "cross-layer-int2", "50%")
    assert not torch.equal(logits, resident)


def test_raw_records_too(prompt):
    store = tiny_store("deepseek_v3", 32, 16)
    full, _, _ = run(store, prompt, "load-on-demand", "100%")
    small, stats, _ = run(store, prompt, "cross-layer", 1)
    assert torch.equal(full, small)
    assert stats.evictions > 0


def test_prefill_chunks_do_not_depend_on_the_budget(mini_store, prompt):
    """Chunks are the envelope's: the same at any budget, so generate gives the same tokens."""
    texts = []
    for experts in (1, "100%"):
        with fate.load(mini_store, experts=experts, prefill_chunk=16) as model:
            texts.append(model.generate(prompt, max_new_tokens=12, do_sample=False))
    assert torch.equal(*texts)
