"""Decoder layers of one token in one native call: taken where experts are in memory, otherwise and in everything else
told from the modules' own ways by nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fate
from fate.core import Routing
from fate.engine.backend import LayerRuntime
from fate.kernels import native
from fate.kernels.block import BlockRun
from fate.models.fused import block as block_module
from fate.models.fused import whole as whole_module
from tiny import tiny_store

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")
IDS = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(3))
PROMPT = 8


class Taken:
    """How many layers, and blocks, were computed in one call; and how many layers were begun so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers = self.blocks = self.begun = 0
        layer, block = whole_module.decoder_layer, block_module.sparse_block

        def counted_layer(*args: Any) -> Any:
            ran = layer(*args)
            self.begun += 1
            self.layers += isinstance(ran, BlockRun)
            return ran

        def counted_block(*args: Any) -> Any:
            ran = block(*args)
            self.blocks += ran is not None
            return ran

        monkeypatch.setattr(whole_module, "decoder_layer", counted_layer)
        monkeypatch.setattr(block_module, "sparse_block", counted_block)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    return Taken(monkeypatch)


@contextmanager
def loaded(experts: str = "100%", whole: bool = True, family: str = "qwen2_moe", **options: Any) -> Iterator[Any]:
    """A model that guesses nothing; with 100% of its experts, all are in memory. whole: whether it may take our way."""
    store = tiny_store(family, num_key_value_heads=4, dtype="bfloat16")
    with pytest.MonkeyPatch.context() as patch, fate.load(store, experts=experts, **options) as model:
        if not whole:
            patch.setattr(LayerRuntime, "quiet", False)
        model.fate.engine.switch.on = model.fate.engine.switch._verdict = False
        model.fate.engine.switch._rest = 10**9
        manager = model.fate.engine.manager
        if experts == "100%":
            for layer, stored in enumerate(manager.header.layers):
                with manager.lock, manager.begin(Routing(layer, dict.fromkeys(range(stored.num_experts), 1))) as lease:
                    assert sum(len(group) for group in lease) == stored.num_experts
        with torch.inference_mode():
            yield model


def begin(model: Any) -> Any:
    """A cache that holds the prompt."""
    cache = model.fate.new_cache(model.config)
    model(IDS[:, :PROMPT], past_key_values=cache)
    return cache


def decode(model: Any, cache: Any, first: int = PROMPT, count: int = 6, **options: Any) -> list[Tensor]:
    return [model(IDS[:, at : at + 1], past_key_values=cache, **options).logits for at in range(first, first + count)]


def same(ours: list[Tensor], own: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, own, strict=True))


def expected(first: int, count: int = 6, family: str = "qwen2_moe") -> list[Tensor]:
    """What the modules' own ways give for these tokens."""
    with loaded(whole=False, family=family) as model:
        return decode(model, begin(model), count=first + count - PROMPT)[-count:]


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe", "mixtral"])
def test_where_all_is_in_memory(family: str, taken: Taken) -> None:
    """After the trials of parts, blocks and layers every further token is one call a layer."""
    with loaded(family=family) as model:
        layers, cache = model.config.num_hidden_layers, begin(model)
        start = decode(model, cache, count=3)
        taken.layers = taken.blocks = 0
        logits = start + decode(model, cache, PROMPT + 3, 9)
        assert (taken.layers, taken.blocks) == (9 * layers, 0)
    assert same(logits, expected(PROMPT, 12, family))


@pytest.mark.parametrize("experts", ["100%", "90%", "75%"])
def test_counts_traces_and_caches_are_the_same(experts: str, taken: Taken) -> None:
    found = []
    for whole in (True, False):
        with loaded(experts, whole) as model:
            manager = model.fate.engine.manager
            with model.fate.record_routing() as recorder, model.fate.record() as timeline:
                logits = decode(model, begin(model), count=30)
                model(IDS[:, :1])  # a prompt of one token
            kinds = [(event.kind, event.layer) for event in timeline.events if event.kind in ("layer", "compute")]
            counts = [(stats.prefill, stats.decode) for stats in model.fate.layer_stats()]
            for stats in (stats for pair in counts for stats in pair):
                assert 0 <= stats.expert_compute_s <= stats.total_s
                stats.stall_s = stats.expert_compute_s = stats.total_s = 0.0
            cached = [list(manager.cache._cached[layer]) for layer in range(len(counts))]
            orders = [vars(policy) for policy in manager.cache._policies]
            found.append((logits, recorder.trace().steps, len(kinds), counts, cached, orders))
        if whole:
            assert taken.layers > 10
            assert (taken.begun > taken.layers) == (experts != "100%")
            taken.begun = 0
    assert taken.begun == 0
    assert same(found[0][0], found[1][0])
    if experts == "100%":
        assert found[0][2] == found[1][2]
    assert found[0][1] == found[1][1]
    assert found[0][3:] == found[1][3:]


def heard(*args: Any) -> None:
    """A hook that only listens."""


def of_layer(model: Any) -> Any:
    return model.model.layers[1]


CHANGES: dict[str, Any] = {
    "hook on attention": lambda layer: layer.self_attn.register_forward_hook(heard),
    "hook on a projection": lambda layer: layer.self_attn.k_proj.register_forward_pre_hook(heard),
    "hook on a norm": lambda layer: layer.input_layernorm.register_forward_hook(heard),
    "hook on the block": lambda layer: layer.mlp.register_forward_hook(heard),
    "pre-hook on the block": lambda layer: layer.mlp.register_forward_pre_hook(heard),
    "hook on the router": lambda layer: layer.mlp.gate.register_forward_hook(heard),
    "hook on the experts": lambda layer: layer.mlp.experts.register_forward_hook(heard),
    "hook on the shared expert": lambda layer: layer.mlp.shared_expert.register_forward_hook(heard),
    "hook within the shared expert": lambda layer: layer.mlp.shared_expert.up_proj.register_forward_hook(heard),
    "hook on its gate": lambda layer: layer.mlp.shared_expert_gate.register_forward_hook(heard),
}
CHANGES_OF_RESULT: dict[str, Any] = {
    "eps": lambda layer: setattr(layer.post_attention_layernorm, "variance_epsilon", 0.5),
    "a norm's weight": lambda layer: setattr(layer.input_layernorm.weight, "data", layer.input_layernorm.weight * 2),
    "top_k": lambda layer: setattr(layer.mlp.gate, "top_k", 1),
    "norm_topk_prob": lambda layer: setattr(layer.mlp.gate, "norm_topk_prob", True),
    "router": lambda layer: setattr(layer.mlp.gate, "weight", nn.Parameter(-layer.mlp.gate.weight, False)),
    "router in place": lambda layer: layer.mlp.gate.weight.data.neg_(),
    "scaling": lambda layer: setattr(layer.self_attn, "scaling", 0.01),
    "projections": lambda layer: setattr(layer.self_attn, "k_proj", layer.self_attn.q_proj),
    "bias": lambda layer: setattr(layer.self_attn.q_proj, "bias", nn.Parameter(layer.self_attn.q_proj.bias + 1, False)),
    "packed": lambda layer: setattr(layer.self_attn.v_proj, "packed", layer.self_attn.k_proj.packed),
    "shared expert": lambda layer: setattr(layer.mlp.shared_expert, "up_proj", layer.mlp.shared_expert.gate_proj),
    "its gate": lambda layer: layer.mlp.shared_expert_gate.weight.data.add_(1),
    "result of the experts": lambda layer: layer.mlp.experts.register_forward_hook(lambda *args: args[2] * 2),
    "result of the router": lambda layer: layer.mlp.gate.register_forward_hook(
        lambda *args: (args[2][0], args[2][1] * 2, args[2][2])
    ),
    "forward of the block": lambda layer: setattr(layer.mlp, "forward", lambda x: x),
    "forward of the experts": lambda layer: setattr(layer.mlp.experts, "forward", lambda x, *routing: x),
}


@pytest.mark.parametrize("change", [*CHANGES, *CHANGES_OF_RESULT])
def test_a_change_is_noticed_at_once(change: str, taken: Taken) -> None:
    results = []
    for whole in (False, True):
        with loaded(whole=whole) as model:
            cache = begin(model)
            decode(model, cache, count=4)
            taken.layers = 0
            {**CHANGES, **CHANGES_OF_RESULT}[change](of_layer(model))
            results.append(decode(model, cache, PROMPT + 4, 3))
            layers = model.config.num_hidden_layers
    assert same(*results)
    assert taken.layers >= 3 * (layers - 1), "other layers go on"
    if change in CHANGES:
        assert taken.layers == 3 * (layers - 1)
        assert same(results[1], expected(PROMPT + 4, 3))
    else:
        assert not same(results[1], expected(PROMPT + 4, 3))


def test_what_is_asked_for_besides(taken: Taken) -> None:
    """Router logits and hidden states; afterwards all is as before."""
    results = []
    for whole in (False, True):
        with loaded(whole=whole) as model:
            cache = begin(model)
            decode(model, cache, count=4)
            taken.layers = 0
            asked = {"output_router_logits": True, "output_hidden_states": True}
            given = model(IDS[:, PROMPT + 4 : PROMPT + 5], past_key_values=cache, **asked)
            assert taken.layers == 0
            logits = decode(model, cache, PROMPT + 5, 1)
            taken.layers = 0
            logits += decode(model, cache, PROMPT + 6, 2)
            assert taken.layers == whole * 2 * model.config.num_hidden_layers
            assert len(given.router_logits) == len(given.hidden_states) - 1 == model.config.num_hidden_layers
            hidden = model(IDS[:, PROMPT + 8 : PROMPT + 9], past_key_values=cache, output_hidden_states=True)
            assert len(hidden.hidden_states) == model.config.num_hidden_layers + 1
            results.append([*logits, *given.router_logits, *given.hidden_states, *hidden.hidden_states])
    assert same(*results)


def test_gradients_are_not_lost(taken: Taken) -> None:
    with loaded() as model:
        for gradients in (False, True):
            with torch.inference_mode(False), torch.set_grad_enabled(gradients):
                of_layer(model).mlp.shared_expert_gate.weight.requires_grad_(gradients)
                cache = begin(model)
                for at in range(PROMPT, PROMPT + 5):
                    before = taken.layers
                    out = model.model(IDS[:, at : at + 1], past_key_values=cache).last_hidden_state
            assert (taken.layers > before) == (not gradients)
            assert out.requires_grad == gradients


def test_other_caches_batches_and_modes(taken: Taken) -> None:
    with loaded(max_batch=2) as model:
        cache = begin(model)
        decode(model, cache, count=4)
        taken.layers = 0
        two = model.fate.new_cache(model.config)
        model(IDS[:, :16].view(2, 8), past_key_values=two)
        model(IDS[:, 16:18].view(2, 1), past_key_values=two)
        decode(model, model(IDS[:, :PROMPT], use_cache=True).past_key_values, count=1)  # it grows
        assert taken.layers == 0
        decode(model, begin(model), count=1)
        taken.layers = 0
        watched = begin(model)
        watched.layers[0].update = watched.layers[0].update  # someone listens
        decode(model, watched, count=1)
        assert taken.layers == model.config.num_hidden_layers - 1
        model.train()
        taken.layers = 0
        decode(model, cache, PROMPT + 4, 1)
        assert taken.layers == 0


def test_a_layer_whose_bits_differ_is_never_trusted(monkeypatch: pytest.MonkeyPatch, taken: Taken) -> None:
    right = whole_module.decoder_layer

    def wrong(*args: Any) -> Any:
        ran = right(*args)
        return ran._replace(out=ran.out * 1.01) if isinstance(ran, BlockRun) else ran

    monkeypatch.setattr(whole_module, "decoder_layer", wrong)
    with loaded() as model:
        logits = decode(model, begin(model))
        assert taken.layers == model.config.num_hidden_layers, "once each, to be compared"
        assert taken.blocks > 0
    assert same(logits, expected(PROMPT))


@pytest.mark.parametrize("harm", ["fails", "writes"])
def test_a_rehearsal_harms_no_answer(harm: str, monkeypatch: pytest.MonkeyPatch, taken: Taken) -> None:
    """It may fail, or put something else into the cache where the token is."""
    right = whole_module.decoder_layer

    def wrong(*args: Any) -> Any:
        if harm == "fails":
            raise MemoryError("no room")
        keys, values, place = args[4]
        ran = right(*args)
        keys[..., place, :] = values[..., place, :] = 7.0
        return ran._replace(out=ran.out * 1.01) if isinstance(ran, BlockRun) else ran

    monkeypatch.setattr(whole_module, "decoder_layer", wrong)
    with loaded() as model:
        logits = decode(model, begin(model))
        assert [layer._same_bits for layer in model.model.layers] == [
            dict.fromkeys(of_layer(model)._same_bits, False)
        ] * 3
    assert same(logits, expected(PROMPT))


def test_a_block_whose_bits_differ_is_never_trusted(monkeypatch: pytest.MonkeyPatch, taken: Taken) -> None:
    right = block_module.sparse_block

    def wrong(*args: Any) -> Any:
        ran = right(*args)
        return ran if ran is None else ran._replace(out=ran.out * 1.01)

    monkeypatch.setattr(block_module, "sparse_block", wrong)
    with loaded() as model:
        logits = decode(model, begin(model))
        assert taken.blocks == model.config.num_hidden_layers
        assert taken.layers == 0
    assert same(logits, expected(PROMPT))


def test_copies_find_out_anew(taken: Taken) -> None:
    with loaded() as model:
        decode(model, begin(model), count=4)
        layer = of_layer(model)
        assert layer._whole is not None
        assert copy.deepcopy(layer._whole) is None
        assert pickle.loads(pickle.dumps(layer._whole)) is None


def test_another_engine(taken: Taken) -> None:
    """Its slots are others."""
    with loaded() as model:
        decode(model, begin(model))
        model.fate.reconfigure(system="load-on-demand", experts="60%")
        taken.begun = 0
        assert same(decode(model, begin(model)), expected(PROMPT))
        assert taken.begun == 0, "a predictor is asked, if in vain"
        model.fate.reconfigure(system="load-on-demand", experts="100%")
        cache = begin(model)
        model(IDS, past_key_values=model.fate.new_cache(model.config))
        assert same(decode(model, cache), expected(PROMPT))
