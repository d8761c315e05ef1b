"""`fate inspect --text`: what the routers see, against the same counted by hand on transformers' own model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import fate
from fate.errors import UsageError
from fate.models.adapter import find_moe_layers
from fate.tools.similarity import measure_similarity
from tiny import tiny_checkpoint, tiny_store

FAMILY, TOP_K, EXPERTS = "qwen2_moe", 3, 8


@pytest.fixture
def ids():
    return torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def gates(ids):
    """(gate input [tokens, hidden], router weight [experts, hidden]) of each layer, from transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(FAMILY))
    seen = []
    for layer in find_moe_layers(model):
        layer.router.register_forward_hook(
            lambda router, args, output: seen.append((args[0].reshape(-1, args[0].shape[-1]), router.weight.detach()))
        )
    with torch.inference_mode():
        model(ids[None])
    return seen


def first(gate_input, weight, count):
    return (gate_input @ weight.T).topk(count, dim=-1).indices


def share_found(needed, candidates):
    return (needed[:, :, None] == candidates[:, None, :]).any(dim=-1).float().mean().item()


@pytest.mark.parametrize("limits", [{}, {"prefill_chunk": 7}])
def test_what_a_count_by_hand_gives(ids, gates, limits):
    with fate.load(tiny_store(FAMILY, 32, 16), system="load-on-demand", **limits) as model:
        layers = measure_similarity(model, ids)
    assert [layer.note for layer in layers] == [""] * 3
    for at, layer in enumerate(layers):
        given, weight = gates[at]
        needed = first(given, weight, TOP_K)
        load = torch.bincount(needed.reshape(-1), minlength=EXPERTS)
        assert (layer.top_k, layer.num_experts) == (TOP_K, EXPERTS)
        assert layer.load_balance == pytest.approx((load.max() / load.float().mean()).item(), rel=0.02)
        if at < 2:
            cosine = torch.cosine_similarity(given, gates[at + 1][0], dim=-1).mean().item()
            assert layer.cosine_to_next == pytest.approx(cosine, abs=1e-3)
        if at > 0:
            before = gates[at - 1][0]
            for got, count in ((layer.recall_at_k, TOP_K), (layer.recall_at_2k, 2 * TOP_K)):
                assert got == pytest.approx(share_found(needed, first(before, weight, count)), abs=0.01)
    assert layers[0].recall_at_k is layers[0].recall_at_2k is layers[2].cosine_to_next is None
    assert layers[1].recall_at_k < layers[1].recall_at_2k, "or the two could be one figure"


def test_a_text_longer_than_the_context_is_read_in_windows(ids):
    with fate.load(tiny_store(FAMILY), system="load-on-demand", max_context=40) as model:
        told = []
        layers = measure_similarity(model, ids, lambda done, total: told.append((done, total)))
        assert model.fate.stats().total.tokens == len(ids)
    assert told == [(40, 90), (80, 90), (90, 90)]
    assert layers[1].recall_at_k is not None


def test_what_a_router_chooses_comes_before_what_its_logits_say(ids):
    """deepseek_v3 adds a bias to what it chooses by: here so much that it says the same whatever it is asked."""
    with fate.load(tiny_store("deepseek_v3", 32, 16), system="load-on-demand") as model:
        assert measure_similarity(model, ids)[1].recall_at_2k < 1
        find_moe_layers(model)[1].router.e_score_correction_bias.copy_(10.0 * torch.arange(8))
        second = measure_similarity(model, ids)[1]
    assert (second.recall_at_k, second.recall_at_2k) == (1, 1)
    assert second.load_balance == pytest.approx(8 / 2), "two of eight experts do all the work"


def test_a_layer_whose_router_cannot_be_asked_is_said_to_be_one(ids):
    with fate.load(tiny_store(FAMILY), system="load-on-demand") as model:
        router = find_moe_layers(model)[1].router
        plain = type(router)
        router.__class__ = type("ByToken", (plain,), {"forward": lambda self, x, tokens: plain.forward(self, x)})
        router.register_forward_pre_hook(lambda module, args: (*args, torch.zeros(len(args[0]))))
        layers = measure_similarity(model, ids)
    assert [layer.note[:33] for layer in layers] == ["", "its router cannot be asked ahead:", ""]
    assert (layers[1].recall_at_k, layers[1].recall_at_2k) == (None, None)
    assert layers[1].load_balance >= 1
    assert layers[1].cosine_to_next is not None
    assert layers[2].recall_at_k is not None


def test_no_hook_is_left_behind(ids):
    with fate.load(tiny_store(FAMILY), system="load-on-demand") as model:
        router = find_moe_layers(model)[0].router
        before = list(router._forward_hooks)
        measure_similarity(model, ids)
        assert list(router._forward_hooks) == before
        with pytest.raises(UsageError, match="the text has no tokens"):
            measure_similarity(model, ids[:0])
