"""Which attention calls the kernel takes, what is left to sdpa, and torch's threads around a step."""

from pathlib import Path

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import fate
from fate import kernels
from fate.convert import convert
from fate.kernels import native
from fate.models.attention import ATTENTION_FUNCTION, attention_forward
from sweep.checkpoints import save_checkpoint
from sweep.discovery import find_composites
from sweep.tiny_configs import tiny_config
from tiny import tiny_store

pytestmark = pytest.mark.skipif(native.extension() is None, reason="needs the compiled extension")


class Attention(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


@pytest.mark.parametrize("masked", [False, True])
def test_what_the_kernel_does_not_do_is_left_to_sdpa(masked, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(1, heads, n, 16, generator=generator) for heads, n in ((4, 1), (2, 6), (2, 6)))
    mask = torch.tensor([False, True, True, True, True, True]).expand(1, 1, 1, 6) if masked else None
    called, real = [], kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: (called.append(1), real(*args))[1])
    out, _ = attention_forward(Attention(), query, keys, values, mask, scaling=0.25)
    expected, _ = sdpa_attention_forward(Attention(), query, keys, values, mask, scaling=0.25)
    assert bool(called) == (not masked)
    torch.testing.assert_close(out, expected)


def test_models_use_it_and_keep_torchs_threads():
    torch.set_num_threads(2)
    with fate.load(tiny_store("qwen2_moe")) as model:
        assert model.config._attn_implementation == ATTENTION_FUNCTION
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)
        assert torch.get_num_threads() == 2
        with pytest.raises(IndexError):
            model(torch.tensor([[10**6]]))
        assert torch.get_num_threads() == 2, "also after a forward that failed"


def test_a_multimodal_models_text_attention_is_ours_until_somebody_sets_another(tmp_path: Path) -> None:
    family = next(family for family in find_composites() if family.name == "gemma4")
    store = convert(save_checkpoint(tiny_config(family), tmp_path / "checkpoint"), tmp_path / "store")
    with fate.load(store, on_plan=lambda *_: None) as model, torch.inference_mode():
        text = [module for module in model.modules() if type(module).__name__ == "Gemma4TextAttention"]
        ids = torch.randint(0, 200, (1, 12), generator=torch.Generator().manual_seed(0))
        assert {module.config._attn_implementation for module in text} == {ATTENTION_FUNCTION}
        ours = model(input_ids=ids).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(input_ids=ids).logits, ours, rtol=1e-3, atol=1e-3)
        assert {module.config._attn_implementation for module in text} == {"eager"}


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_prompt_with_sinks(hidden: int) -> None:
    """hidden: positions on the left that nobody sees. Against transformers' eager attention in float64."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 16, generator=generator) for heads in (4, 2, 2))
    sinks, module = torch.randn(4, generator=generator), Attention()
    module.sinks = sinks.double()
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    seen[hidden:, :hidden] = False
    mask = seen.expand(2, 1, 9, 9)
    additive = torch.zeros(2, 1, 9, 9, dtype=torch.float64).masked_fill(~mask, -1e30)
    wanted, _ = eager_attention_forward(module, *(t.double() for t in (query, key, value)), additive, 0.25)
    given = mask if hidden else None
    ours, _ = attention_forward(module, query, key, value, given, scaling=0.25, s_aux=sinks)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sunk", [False, True])
def test_one_token_with_sinks(sunk: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, h, n, 16, generator=generator) for h, n in ((4, 1), (2, 9), (2, 9)))
    sinks, module = torch.full((4,), 30.0) if sunk else torch.randn(4, generator=generator), Attention()
    module.sinks = sinks.double()
    wanted, _ = eager_attention_forward(module, *(t.double() for t in (query, key, value)), None, 0.25)
    ours, _ = attention_forward(module, query, key, value, None, scaling=0.25, s_aux=sinks)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)
