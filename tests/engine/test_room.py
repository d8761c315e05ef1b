"""The slots that guesses use serve the layers' caches while prefetching is given up."""

import pytest
import torch

import fate
from engine_support import stepwise_logits
from fate.engine.switch import RETRY_STEPS
from tiny import tiny_store

FATE = fate.System("tried", predictor="cross-layer", policy="arc", early_routing=True, switches_off=True)
LAYERS, EXPERTS = 4, 32


@pytest.fixture(scope="module")
def store():
    return tiny_store("qwen2_moe", num_hidden_layers=LAYERS, num_experts=EXPERTS, num_experts_per_tok=2)


def judge(engine, on_s, off_s):
    """Decide, as if steps took so long with guesses and without."""
    switch = engine.switch
    while not switch._rest:
        switch.begin_step()
        switch.end_step(on_s if switch.on else off_s)


def test_the_layers_have_it_while_guesses_are_given_up(store, prompt):
    with fate.load(store, experts="75%", system="load-on-demand") as model:
        expected = stepwise_logits(model, prompt)
        on_demand = model.fate.engine.manager.cache
        division = on_demand.capacities, on_demand.transient
    with fate.load(store, experts="75%", system=FATE) as model:
        engine = model.fate.engine
        cache = engine.manager.cache
        guessing = cache.capacities, cache.transient
        assert guessing[1] > division[1]
        assert torch.equal(stepwise_logits(model, prompt), expected)
        assert (cache.capacities, cache.transient) == guessing
        judge(engine, 0.2, 0.1)
        assert torch.equal(stepwise_logits(model, prompt), expected)
        assert (cache.capacities, cache.transient) == division
        assert any(cache.num_cached(layer) > guessing[0][layer] for layer in range(LAYERS)), "and use it"
        assert "prefetching is off" in model.fate.notes[0]
        for _ in range(RETRY_STEPS):
            engine.switch.end_step(0.1)
        before = model.fate.stats()
        assert torch.equal(stepwise_logits(model, prompt), expected)
        assert (cache.capacities, cache.transient) == guessing, "it is tried again"
        assert (model.fate.stats() - before).decode.prefetch_bytes > 0


def test_nothing_changes_where_it_pays(store, prompt):
    with fate.load(store, experts="75%", system=FATE) as model:
        cache = model.fate.engine.manager.cache
        guessing = cache.capacities, cache.transient
        stepwise_logits(model, prompt)
        judge(model.fate.engine, 0.1, 0.2)
        stepwise_logits(model, prompt)
        assert (cache.capacities, cache.transient) == guessing


def test_a_system_that_never_gives_up_has_no_such_room(store):
    with fate.load(store, experts="75%", system="cross-layer") as model:
        assert model.fate.engine.room is None


def test_what_is_still_held_postpones_it(store, prompt):
    with fate.load(store, experts="75%", system=FATE) as model:
        engine = model.fate.engine
        cache = engine.manager.cache
        guessing = cache.capacities, cache.transient
        judge(engine, 0.2, 0.1)
        stepwise_logits(model, prompt)
        held = {key for key, entry in cache._entries.items() if not entry.staged}
        cache.pinned.update(held)
        engine.room.divide(guessing=True)
        assert cache.transient < guessing[1]
        assert held == {key for key, entry in cache._entries.items() if not entry.staged}
        cache.pinned.clear()
        engine.room.divide(guessing=True)
        assert (cache.capacities, cache.transient) == guessing
        assert len(held) > sum(map(cache.num_cached, range(LAYERS)))


def test_all_experts_fit_so_none_is_kept_out(store, prompt):
    with fate.load(store, system=FATE) as model:
        stepwise_logits(model, prompt)
        assert model.fate.engine.manager.cache.capacities == (EXPERTS,) * LAYERS
