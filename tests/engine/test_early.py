"""Early routing: which blocks get it, that it changes nothing, and that the model's own routing counts."""

import pytest
import torch

import fate
from engine_support import stepwise_logits
from fate.engine.backend import LayerRuntime
from fate.engine.payoff import TRIAL, Payoff
from fate.errors import ClosedError
from tiny import tiny_store

EARLY = fate.System("early", predictor="none", early_routing=True)
LATE = fate.System("late", predictor="none")


@pytest.fixture(autouse=True)
def always(request, monkeypatch):
    """Ask early however small the model is, but where a test is about that."""
    if "payoff" not in request.node.name:
        monkeypatch.setattr(Payoff, "pays", True)


@pytest.mark.parametrize("family, early", [("qwen2_moe", True), ("deepseek_v3", False), ("mixtral", False)])
def test_where_the_shared_expert_comes_before_the_router(family, early, prompt, monkeypatch):
    begun = []
    real = LayerRuntime.begin_early
    monkeypatch.setattr(LayerRuntime, "begin_early", lambda self, *args: (begun.append(1), real(self, *args)))
    ids = prompt % 250
    with fate.load(tiny_store(family), experts="60%", system=LATE) as model:
        expected = stepwise_logits(model, ids)
        late = model.fate.stats().total
    assert not begun
    with fate.load(tiny_store(family), experts="60%", system=EARLY) as model:
        assert torch.equal(stepwise_logits(model, ids), expected)
        assert model.fate.stats().total.hits == late.hits
    assert bool(begun) == early


def test_a_router_that_says_something_else_the_second_time(prompt, monkeypatch):
    """The early word is dropped, what the model routes is computed."""
    ids = prompt % 250
    with fate.load(tiny_store("qwen2_moe"), experts="60%", system=LATE) as model:
        expected = stepwise_logits(model, ids)
    real = LayerRuntime.begin_early
    monkeypatch.setattr(
        LayerRuntime,
        "begin_early",
        lambda self, x, pairs, start: real(self, x, {(e + 1) % 8: n for e, n in pairs.items()}, start),
    )
    with fate.load(tiny_store("qwen2_moe"), experts="60%", system=EARLY) as model:
        assert torch.equal(stepwise_logits(model, ids), expected)
        assert not model.fate.engine.manager.cache.pinned


def test_an_interrupt_while_reading_ahead_leaves_nothing_half_done(prompt, monkeypatch):
    """The next forward starts from an empty cache, as after any other."""
    ids = prompt % 250
    with fate.load(tiny_store("qwen2_moe"), experts="60%", system=LATE) as model:
        expected = stepwise_logits(model, ids)
    with fate.load(tiny_store("qwen2_moe"), experts="60%", system=EARLY) as model:
        stepwise_logits(model, ids)
        manager = model.fate.engine.manager

        def interrupted(entry, wanted):
            manager.cache._free.clear()  # as a slot taken from the free ones and given to nobody
            raise KeyboardInterrupt

        monkeypatch.setattr(manager, "demand", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stepwise_logits(model, ids)
        monkeypatch.undo()
        assert not manager.sound
        assert torch.equal(stepwise_logits(model, ids), expected)
        assert manager.sound
        cache = manager.cache
        assert len(cache._free) + len(cache._entries) + len(manager.draining()) == cache.num_slots


def test_closed_between_the_early_word_and_the_experts(prompt, monkeypatch):
    """The slots are gone by then: an error, never other bits."""
    real = LayerRuntime.begin_early
    with fate.load(tiny_store("qwen2_moe"), experts="60%", system=EARLY) as model:
        stepwise_logits(model, prompt % 250)
        monkeypatch.setattr(LayerRuntime, "begin_early", lambda self, *args: (real(self, *args), model.fate.close()))
        with pytest.raises(ClosedError):
            model(prompt % 250)


def test_payoff_where_a_layer_waits():
    payoff = Payoff()
    for _ in range(TRIAL - 1):
        payoff.asked(0.001)
        payoff.waited(0.0)
        assert payoff.pays, "too early to say"
    payoff.waited(0.0)
    assert not payoff.pays
    for _ in range(60):
        payoff.waited(0.010)
    assert payoff.pays, "it waits now"
    for _ in range(60):
        payoff.asked(0.001)
        payoff.waited(0.0002)
    assert not payoff.pays
    for _ in range(100):
        payoff.waited(0.0002)
    assert payoff.pays, "what asking took is forgotten"


def test_payoff_decides_by_prompts_and_tokens_apart(prompt, monkeypatch):
    """Of a layer that never waits, only the first forwards of each kind ask."""
    asked = []
    real = LayerRuntime.begin_early
    monkeypatch.setattr(
        LayerRuntime, "begin_early", lambda self, x, *args: (asked.append((self.index, len(x))), real(self, x, *args))
    )
    monkeypatch.setattr(Payoff, "waited", lambda self, seconds, real=Payoff.waited: real(self, 0.0))
    with fate.load(tiny_store("qwen2_moe"), experts="60%", system=EARLY) as model:
        for _ in range(TRIAL + 2):
            stepwise_logits(model, prompt % 250)
    of_first_layer = [tokens for layer, tokens in asked if layer == 0]
    assert sum(tokens > 1 for tokens in of_first_layer) == TRIAL - 1, "the block was watched in the first"
    assert sum(tokens == 1 for tokens in of_first_layer) == TRIAL
