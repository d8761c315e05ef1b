"""Decoder layers by two native calls: where they are made, the bits they give, and changes of a model that they see."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from torch import nn

import fate
from fate.cli.app import main
from fate.kernels import native
from native_support import IDS, PROMPT, SHAPES, Calls, begin, by_modules, decoded, loaded, step
from tiny import tiny_store

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize(
    "system, experts",
    [
        *(("fate", "100%"), ("fate", "50%"), ("fate", 1), ("load-on-demand", 1)),
        *(("load-on-demand-uncached", "50%"), ("eap", "50%"), ("eap", 1)),
    ],
)
def test_every_system_computes_by_the_same_calls_from_the_first_token(calls: Calls, system: str, experts: Any) -> None:
    """One of attention and routing for each layer and token, whatever is in memory and whoever predicts."""
    with loaded(experts, system=system) as model:
        cache, layers = begin(model), model.config.num_hidden_layers
        for _ in range(20):  # also steps with and without prefetching, which the switch compares
            calls.reset()
            before = model.fate.stats().decode
            step(model, cache)
            misses = (model.fate.stats().decode - before).misses
            assert calls.attention == layers
            assert layers <= calls.experts <= layers + misses + layers
            assert misses or calls.experts == layers


@pytest.mark.parametrize("family", SHAPES)
def test_the_bits_are_those_of_the_modules(family: str, calls: Calls) -> None:
    with loaded(family=family) as model:
        ours = decoded(model, begin(model), 12)
        assert calls.attention == 12 * model.config.num_hidden_layers
        with by_modules():
            theirs = decoded(model, begin(model), 12)
        assert calls.attention == 12 * model.config.num_hidden_layers
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("experts", ["100%", "50%", 1])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_a_row_does_not_depend_on_the_rows_beside_it(family: str, experts: Any, calls: Calls) -> None:
    rows = 5
    with loaded(experts, family, max_batch=rows) as model:
        together = decoded(model, begin(model, IDS[:rows]), 6, IDS[:rows])
        assert calls.attention == 6 * model.config.num_hidden_layers
        for row in range(rows):
            ids = IDS[row : row + 1]
            assert torch.equal(decoded(model, begin(model, ids), 6, ids)[0], together[row]), row


def test_attention_of_another_kind_keeps_its_modules_and_gets_the_other_half(calls: Calls) -> None:
    """DeepSeek's latent attention and router; its experts and shared expert are one native call."""
    with loaded(family="deepseek_v3") as model:
        sparse = len(model.fate.layer_stats())
        cache = begin(model)
        calls.reset()
        ours = decoded(model, cache, 6)
        assert calls.attention == 0
        assert calls.experts >= 6 * sparse
        with by_modules():
            theirs = decoded(model, begin(model), 6)
        assert torch.equal(ours, theirs)


def test_a_dense_layer_keeps_its_mlp(calls: Calls) -> None:
    """Every second layer has no experts."""
    store = tiny_store("qwen2_moe", dtype="bfloat16", num_key_value_heads=4, decoder_sparse_step=2)
    with fate.load(store) as model, torch.inference_mode():
        ours = decoded(model, begin(model), 6)
        assert calls.attention == 6 * model.config.num_hidden_layers
        assert len(model.fate.layer_stats()) == 1
        with by_modules():
            assert torch.equal(ours, decoded(model, begin(model), 6))


HEARD: dict[str, Any] = {
    "attention": lambda layer: layer.self_attn,
    "projection": lambda layer: layer.self_attn.k_proj,
    "norm": lambda layer: layer.input_layernorm,
    "block": lambda layer: layer.mlp,
    "router": lambda layer: layer.mlp.gate,
    "experts": lambda layer: layer.mlp.experts,
    "shared expert": lambda layer: layer.mlp.shared_expert,
    "within the shared expert": lambda layer: layer.mlp.shared_expert.up_proj,
    "activation": lambda layer: layer.mlp.shared_expert.act_fn,
    "gate of the shared expert": lambda layer: layer.mlp.shared_expert_gate,
}


@pytest.mark.parametrize("name", HEARD)
def test_hooks_are_honoured(name: str, calls: Calls) -> None:
    """Registered between two tokens, in one layer; the others go on natively, and so does it once the hook is gone."""
    with loaded() as model:
        layers = model.config.num_hidden_layers
        expected = decoded(model, begin(model), 6)
        module = HEARD[name](model.model.layers[1])
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            cache, heard = begin(model), []
            got = [step(model, cache), step(model, cache)]
            handle = register(lambda *args, heard=heard: heard.append(1))
            calls.reset()
            got += [step(model, cache), step(model, cache)]
            assert len(heard) == 2
            assert calls.attention == 2 * layers - 2 or name in _OF_THE_BLOCK
            handle.remove()
            calls.reset()
            got += [step(model, cache), step(model, cache)]
            assert len(heard) == 2
            assert calls.attention == 2 * layers
            assert torch.equal(torch.stack(got, dim=1), expected)


_OF_THE_BLOCK = {name for name in HEARD if name not in ("attention", "projection", "norm")}


def _replace_weight(layer: Any) -> None:
    layer.input_layernorm.weight.data = layer.input_layernorm.weight * 2


CHANGES: dict[str, Any] = {
    "eps": lambda layer: setattr(layer.post_attention_layernorm, "variance_epsilon", 0.5),
    "a norm's weight, in other memory": _replace_weight,
    "a norm's weight, in place": lambda layer: layer.input_layernorm.weight.mul_(2),
    "top_k": lambda layer: setattr(layer.mlp.gate, "top_k", 1),
    "renormalizing": lambda layer: setattr(layer.mlp.gate, "norm_topk_prob", True),
    "router": lambda layer: layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.flip(0)),
    "gate of the shared expert": lambda layer: layer.mlp.shared_expert_gate.weight.zero_(),
    "a norm replaced": lambda layer: setattr(layer, "input_layernorm", nn.Identity()),
    "scaling": lambda layer: setattr(layer.self_attn, "scaling", 1.0),
    "a bias": lambda layer: layer.self_attn.q_proj.bias.add_(1.0),
    "a forward": lambda layer: setattr(layer.mlp, "forward", lambda x: torch.zeros_like(x)),
}


def decoded_after(change: Any) -> torch.Tensor:
    """Natively, two tokens before it and three after."""
    with loaded() as model:
        cache = begin(model)
        decoded(model, cache, 2)
        change(model.model.layers[1])
        return decoded(model, cache, 3)


@pytest.fixture(scope="module")
def unchanged() -> torch.Tensor:
    return decoded_after(lambda layer: None)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_two_tokens_is_seen(name: str, unchanged: torch.Tensor) -> None:
    ours = decoded_after(CHANGES[name])
    with loaded() as model:
        cache = begin(model)
        decoded(model, cache, 2)
        CHANGES[name](model.model.layers[1])
        with by_modules():
            assert torch.equal(ours, decoded(model, cache, 3))
    assert not torch.equal(ours, unchanged), "it changes the result"


def test_another_attention_is_taken(calls: Calls) -> None:
    with loaded() as model:
        cache = begin(model)
        decoded(model, cache, 2)
        calls.reset()
        model.set_attn_implementation("eager")
        decoded(model, cache, 2)
        assert calls.attention == 0


def test_refresh_reads_what_went_past_every_watch() -> None:
    with loaded() as model:
        before = decoded(model, begin(model), 3)
        model.model.layers[1].input_layernorm.__dict__["variance_epsilon"] = 0.5
        model.fate.refresh()
        after = decoded(model, begin(model), 3)
        assert not torch.equal(before, after)
        with by_modules():
            assert torch.equal(after, decoded(model, begin(model), 3))


@pytest.mark.parametrize("what", ["gradients", "two tokens", "training", "outputs"])
def test_other_calls_go_by_the_modules(what: str, calls: Calls) -> None:
    with loaded() as model:
        cache = begin(model)
        calls.reset()
        if what == "gradients":
            with torch.inference_mode(False), torch.enable_grad():
                embeds = torch.zeros(1, 1, model.config.hidden_size, dtype=model.dtype, requires_grad=True)
                model(inputs_embeds=embeds, past_key_values=model.fate.new_cache(model.config))
        elif what == "two tokens":
            model(IDS[:1, PROMPT : PROMPT + 2], past_key_values=cache)
        elif what == "training":
            model.train()
            step(model, cache)
            model.eval()
        else:
            output = model(IDS[:1, PROMPT : PROMPT + 1], past_key_values=cache, output_router_logits=True)
            assert len(output.router_logits) == model.config.num_hidden_layers
        assert calls.attention == 0
        step(model, begin(model))
        assert calls.attention == model.config.num_hidden_layers, "and the next goes natively again"


def test_a_cache_that_the_model_made_is_gone_on_from_natively(calls: Calls) -> None:
    with loaded() as model:
        made = model(IDS[:1, :PROMPT], use_cache=True).past_key_values
        calls.reset()
        ours = decoded(model, made, 3)
        assert calls.attention == 3 * model.config.num_hidden_layers
        assert torch.equal(ours, decoded(model, begin(model), 3))


def test_a_layer_called_by_itself_goes_by_its_modules(calls: Calls) -> None:
    """Outside of a forward of the model nothing says what step it is."""
    with loaded() as model:
        cache = begin(model)
        x = torch.randn(1, 1, model.config.hidden_size).to(model.dtype)
        rotary = model.model.rotary_emb(x, torch.tensor([[PROMPT]]))
        calls.reset()
        model.model.layers[0](x, position_embeddings=rotary, past_key_values=cache)
        assert calls.attention == 0


def test_chat_decodes_natively(calls: Calls, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    new = 6
    store = tiny_store("qwen2_moe", dtype="bfloat16", num_key_value_heads=4, eos_token_id=None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    with pytest.raises(SystemExit):
        main(["chat", str(store), "-q", "--max-new-tokens", str(new), "--experts", "50%"])
    capsys.readouterr()
    assert calls.attention == (new - 1) * 3, "each decoded token, in each of three layers"
