"""Raw fp32 records give what transformers' own implementation gives, for every family."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import fate
from engine_support import stepwise_logits
from tiny import FAMILIES, tiny_checkpoint, tiny_store


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_fp32_matches_transformers(family, prompt):
    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family))
    expected = stepwise_logits(reference, prompt)
    with fate.load(tiny_store(family, expert_bits=32, dense_bits=16), experts=1) as model:
        got = stepwise_logits(model, prompt)
        assert model.fate.stats().total.evictions > 0
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    assert expected.std() > 0.1, "the model says something, so that agreement means something"


# Other activations than SiLU; biases, transposed and interleaved weights, a limit that these small numbers reach.
GPT_OSS = {"head_dim": 16, "num_local_experts": 8, "layer_types": ["sliding_attention", "full_attention"]}
OTHERS = [
    ("qwen2_moe", {"hidden_act": "gelu"}, True),
    ("gpt_oss", {**GPT_OSS, "swiglu_limit": 0.2}, True),
    ("qwen2_moe", {"hidden_act": "mish"}, False),
]


@pytest.mark.parametrize(("family", "overrides", "fused"), OTHERS, ids=["gelu", "gpt_oss", "mish"])
@pytest.mark.parametrize(("expert_bits", "dense_bits", "bound"), [(32, 16, 2e-5), (4, 8, 0.12)])
def test_experts_of_other_activations(family, overrides, fused, expert_bits, dense_bits, bound, prompt):
    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family, **overrides))
    expected = stepwise_logits(reference, prompt)
    with fate.load(tiny_store(family, expert_bits, dense_bits, **overrides), experts=1) as model:
        layers = [m.fate_layer for m in model.modules() if hasattr(m, "fate_layer")]
        assert all(layer._compute == (layer._fused if fused else layer._generic) for layer in layers)
        got = stepwise_logits(model, prompt)
        assert model.fate.stats().total.evictions > 0
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert (error.max() if expert_bits == 32 else error.median()) < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_int4_is_near_transformers(family, prompt):
    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family))
    expected = stepwise_logits(reference, prompt)
    with fate.load(tiny_store(family, expert_bits=4, dense_bits=8), experts=1) as model:
        got = stepwise_logits(model, prompt)
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)  # a token may be routed elsewhere: the median
    assert error.median() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_matches(family, prompt):
    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family))
    expected = reference.generate(prompt, max_new_tokens=16, do_sample=False)
    with fate.load(tiny_store(family, expert_bits=32, dense_bits=16), experts="40%") as model:
        assert torch.equal(model.generate(prompt, max_new_tokens=16, do_sample=False), expected)


def test_left_padded_batch_matches(prompt):
    """Sequences of different lengths in one batch, padded on the left."""
    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen2_moe"))
    ids = prompt[:, :20].repeat(3, 1)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, :13] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = reference.generate(ids, **arguments)
    with fate.load(tiny_store("qwen2_moe", 32, 16), experts=1, max_batch=3) as model:
        assert torch.equal(model.generate(ids, **arguments), expected)


def test_router_logits_are_the_models_own(prompt):
    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("olmoe"))
    with fate.load(tiny_store("olmoe", 32, 16), experts=1) as model, torch.inference_mode():
        got = model(prompt, output_router_logits=True).router_logits
        expected = reference(prompt, output_router_logits=True).router_logits
    assert len(got) == len(expected) == 2
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
