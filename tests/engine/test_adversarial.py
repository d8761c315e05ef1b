"""A model whose gates name the wrong experts of the layers ahead: prefetching is given up, and then costs nothing."""

import pytest
import torch

import fate
from engine_support import stepwise_logits
from fate.convert import convert
from fate.tools.synth.store import byte_tokenizer
from tiny import tiny_model, tiny_store

SHAPE = {"num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 3}
EXPERTS, RATE, ASKING_S = "50%", 1e9, 40e-6
ON_DEMAND = fate.System("on-demand", policy="lru")
TRIED = fate.System("tried", predictor="cross-layer", policy="lru", switches_off=True)


@pytest.fixture(scope="module")
def unrelated_store(tmp_path_factory):
    """Every layer's gate sees the residual stream with signs of its own: what the layer before saw tells it nothing."""
    folder = tmp_path_factory.mktemp("adversarial")
    model = tiny_model("qwen2_moe", **SHAPE)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.post_attention_layernorm.weight
            weight.copy_(torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1)
    model.save_pretrained(folder / "checkpoint")
    byte_tokenizer().save_pretrained(folder / "checkpoint")
    return convert(folder / "checkpoint", folder / "store")


@pytest.fixture
def ids():
    return torch.randint(0, 256, (1, 140), generator=torch.Generator().manual_seed(8))


def count_time(model, monkeypatch):
    """Steps take what their bytes take on a link, and asking gates a time of its own, whatever this machine does."""

    def clock():
        now = model.fate.stats().decode
        steps_that_predict.update({now.forwards} if now.predict_s > last[0] else ())
        last[0] = now.predict_s
        return now.bytes_moved / RATE + ASKING_S * len(steps_that_predict)

    last, steps_that_predict = [0.0], set()
    monkeypatch.setattr(model.fate.engine.switch, "clock", clock)


def second_run(store, system, ids, monkeypatch):
    """(statistics of decoding the second time, notes, recall of all)"""
    with fate.load(store, experts=EXPERTS, system=system) as model, monkeypatch.context() as patch:
        count_time(model, patch)
        stepwise_logits(model, ids)
        before = model.fate.stats()
        stepwise_logits(model, ids)
        total = model.fate.stats()
        return (total - before).decode, model.fate.notes, total.decode.recall


def test_it_is_given_up_with_the_reason_and_moves_no_byte_more(unrelated_store, ids, monkeypatch, caplog):
    on_demand, _, _ = second_run(unrelated_store, ON_DEMAND, ids, monkeypatch)
    tried, notes, recall = second_run(unrelated_store, TRIED, ids, monkeypatch)
    assert recall < 0.2, "3 of 32 by chance: 0.09"
    assert len(notes) == 1
    assert notes[0].startswith("prefetching is off: decoding takes ")
    assert notes[0] in caplog.messages
    assert on_demand.demand_bytes > 0
    assert tried.prefetch_bytes == 0
    assert tried.predict_s == 0
    assert tried.bytes_moved <= on_demand.bytes_moved
    assert tried.misses <= on_demand.misses


def test_gates_that_know_each_other_are_told_apart(ids, monkeypatch):
    _, _, recall = second_run(tiny_store("qwen2_moe", **SHAPE), TRIED, ids, monkeypatch)
    assert recall > 0.4
