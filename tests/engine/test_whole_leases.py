"""A lease whose experts are all cached whole takes a short way, which may be told from the long one by nothing."""

import random

import pytest
import torch

import fate
from fate.cache import POLICIES
from fate.core import ExpertKey, Precision, Prediction, Routing
from fate.engine.manager import ExpertManager
from fate.systems import System
from tiny import tiny_store

MIXED = System("mixed", predictor="cross-layer", policy="lru", precision="popularity")  # a prompt reads some to less


def manager_of(model):
    return next(m.fate_layer for m in model.modules() if hasattr(m, "fate_layer")).manager


def without_the_short_way(monkeypatch):
    monkeypatch.setattr(ExpertManager, "take_whole", lambda self, routing: None)


@pytest.mark.parametrize("policy", POLICIES.names())
def test_counts_and_order_are_those_of_the_long_way(policy, monkeypatch):

    found = []
    for short in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not short:
                without_the_short_way(patch)
            with fate.load(tiny_store("qwen2_moe"), experts="60%") as model, torch.inference_mode():
                manager = manager_of(model)
                manager.cache._policy = POLICIES.get(policy)
                manager.cache.clear()
                taken, draw = 0, random.Random(3)
                manager.begin_phase(prefill=False)
                for _ in range(400):
                    layer = draw.randrange(len(manager.header.layers))
                    experts = draw.sample(range(manager.header.layers[layer].num_experts), 2)
                    with manager.lock:
                        manager.guess([Prediction(layer, ((experts[0], 0.0), (experts[1], 0.0)))])
                        with manager.begin(Routing(layer, dict.fromkeys(experts, 1))) as lease:
                            taken += lease._whole is not None
                            assert sorted(e.key.expert for group in lease for e in group) == sorted(experts)
                counts = manager.layer_stats(False)
                for stats in counts:
                    stats.stall_s = 0.0
                    stats.prefetch_bytes = stats.prefetch_used_bytes = stats.demand_bytes = 0
                cached = [sorted(manager.cache.cached(layer)) for layer in range(len(counts))]
                assert not manager.cache.pinned
            found.append((counts, cached, taken))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] > 20
    assert found[1][2] == 0


def test_an_expert_that_is_not_whole_takes_the_long_way():
    with fate.load(tiny_store("qwen2_moe"), experts="100%") as model, torch.inference_mode():
        model(torch.arange(12)[None])
        manager = manager_of(model)
        entry = manager.cache.lookup(ExpertKey(0, 0)) or manager.cache.lookup(ExpertKey(0, 1))
        routing = Routing(0, {entry.key.expert: 1})
        assert manager.cache.whole(0, routing.experts) == [entry]
        held = entry.precision
        for precision, transfer in ((Precision.INT2, None), (None, None), (held, object())):
            entry.precision, entry.transfer = precision, transfer
            assert manager.cache.whole(0, routing.experts) is None
        entry.precision, entry.transfer = held, None
        absent = next(e for e in range(9) if manager.cache.lookup(ExpertKey(0, e)) is None)
        assert manager.cache.whole(0, (entry.key.expert, absent)) is None


def test_where_all_is_cached_nothing_is_predicted():
    with fate.load(tiny_store("qwen2_moe"), experts="100%") as model, torch.inference_mode():
        manager, predictor = manager_of(model), model.fate.engine.predictor
        asked, own = [], predictor.predict
        predictor.predict = lambda *args: asked.append(args) or own(*args)
        model(torch.arange(12)[None])
        assert asked, "some were missing"
        for layer, stored in enumerate(manager.header.layers):
            with manager.lock, manager.begin(Routing(layer, dict.fromkeys(range(stored.num_experts), 1))) as lease:
                assert sum(len(group) for group in lease) == stored.num_experts
        assert manager.all_cached
        asked.clear()
        model(torch.arange(12)[None])
        assert not asked


def test_a_router_that_chooses_nobody():
    """As where all chosen are experts that compute nothing (LongCat's), in a token of its own and among others."""
    with fate.load(tiny_store("qwen2_moe"), experts="100%") as model, torch.inference_mode():
        model(torch.arange(12)[None])
        layer = next(m.fate_layer for m in model.modules() if hasattr(m, "fate_layer"))
        manager = layer.manager
        with manager.lock, manager.begin(Routing(0, {})) as lease:
            assert list(lease) == []
        hidden = manager.header.layout(0).matrices[0].cols
        for tokens in (1, 3):
            x = torch.ones(tokens, hidden, dtype=model.dtype)
            index, weights = torch.zeros(tokens, 2, dtype=torch.int64), torch.zeros(tokens, 2, dtype=model.dtype)
            assert not layer.forward(x, index, weights).any()
            assert not layer.forward(x, index + layer._num_experts, weights + 1).any()
        assert manager.sound


def test_the_table_of_slots_says_what_is_cached_whole():
    with fate.load(tiny_store("qwen2_moe"), experts="60%", system=MIXED) as model, torch.inference_mode():
        manager, draw, whole = manager_of(model), random.Random(5), 0
        cache = manager.cache
        for step in range(300):
            manager.begin_phase(prefill=step % 10 == 0)
            layer = draw.randrange(len(manager.header.layers))
            counts = dict.fromkeys(draw.sample(range(manager.header.layers[layer].num_experts), 2), 1)
            with (
                manager.lock,
                manager.begin(Routing(layer, counts, 9 if manager.prefill else 1, manager.prefill)) as lease,
            ):
                list(lease)
            if step == 200:
                manager.cache.clear()
            for at, slots in enumerate(map(cache.whole_slots, range(len(manager.header.layers)))):
                named = {expert: slot for expert, slot in enumerate(slots) if slot >= 0}
                held = {expert: entry for expert, entry in cache._cached[at].items() if cache.whole(at, [expert])}
                assert named == {expert: entry.slot for expert, entry in held.items()}
                whole += len(held)
        assert cache.evictions > 50
        assert whole > 500


def one_token_in_the_base_model(model, cache, token):
    """Around the hooks that end a step."""
    return model.model(torch.tensor([[token]]), past_key_values=cache).last_hidden_state


def test_what_was_put_off_is_done_before_anything_else():
    with fate.load(tiny_store("qwen2_moe"), experts="100%", system="load-on-demand") as model, torch.inference_mode():
        manager, cache = manager_of(model), model.fate.new_cache(model.config)
        for layer, stored in enumerate(manager.header.layers):
            with manager.lock, manager.begin(Routing(layer, dict.fromkeys(range(stored.num_experts), 1))) as lease:
                list(lease)
        model(torch.arange(5)[None], past_key_values=cache)
        for token in range(3):
            model(torch.tensor([[token]]), past_key_values=cache)

        def accesses():
            return sum(stats.accesses for stats in manager._phases[False])

        def lease_on_an_expert():
            with manager.lock, manager.begin(Routing(0, {0: 1})) as lease:
                list(lease)

        def change_of_residency():
            with manager.lock, manager.between_leases():
                pass

        for wants, more in (
            (lambda: model.fate.stats(), 0),
            (lease_on_an_expert, 1),
            (change_of_residency, 0),
            (lambda: manager.begin_phase(prefill=False), 0),
            (model.fate.engine.begin_request, 0),
            (lambda: model.fate.record_routing().__enter__(), 0),
            (lambda: model.fate.record().__enter__(), 0),
        ):
            before = accesses()
            one_token_in_the_base_model(model, cache, 7)
            assert accesses() == before, "put off"
            wants()
            assert accesses() == before + 3 * model.config.num_experts_per_tok + more
            manager.timeline = manager.recorder = None
        before = accesses()
        model(torch.tensor([[7]]), past_key_values=cache)
        assert accesses() > before, "a step's accounts end with it"
        before = accesses()
        for _ in range(6):
            one_token_in_the_base_model(model, cache, 7)
            assert len(manager._unsettled) <= len(manager.header.layers), "without a step they are settled in time"
        model.fate.close()
        assert accesses() == before + 6 * 3 * model.config.num_experts_per_tok


def test_interrupted_in_an_account_the_next_lease_starts_from_an_empty_cache(monkeypatch):
    with fate.load(tiny_store("qwen2_moe"), experts="100%", system="load-on-demand") as model, torch.inference_mode():
        manager, cache = manager_of(model), model.fate.new_cache(model.config)
        model(torch.arange(40)[None], past_key_values=cache)
        expected = model(torch.tensor([[7]]), past_key_values=cache).logits
        cache.crop(-1)

        def interrupted():
            raise KeyboardInterrupt

        manager.later(interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.fate.stats()
        assert not manager.sound
        assert not manager._unsettled
        before = model.fate.stats()
        assert torch.equal(model(torch.tensor([[7]]), past_key_values=cache).logits, expected)
        assert (model.fate.stats() - before).decode.hits == 0
        assert manager.sound
