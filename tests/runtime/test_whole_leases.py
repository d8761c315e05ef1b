"""A lease whose experts are all cached whole takes a short way, which may be told from the long one by nothing."""

import random

import pytest
import torch

import fate
from fate.cache import POLICIES
from fate.core import ExpertKey, Precision, Prediction, Routing
from fate.runtime.manager import ExpertManager
from tiny import tiny_store


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
