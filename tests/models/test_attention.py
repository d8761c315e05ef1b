"""Which attention calls the kernel takes, what is left to sdpa, and torch's threads around a step."""

from pathlib import Path

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

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
    family = next(family for family in find_composites() if family.name == "qwen3_5_moe")
    config = tiny_config(family)
    store = convert(save_checkpoint(config, tmp_path / "checkpoint"), tmp_path / "store")
    with fate.load(store, on_plan=lambda *_: None) as model, torch.inference_mode():
        ids = torch.randint(0, 200, (1, 12), generator=torch.Generator().manual_seed(0))
        named = {m.config._attn_implementation for n, m in model.named_modules() if n.endswith(".self_attn")}
        assert named == {ATTENTION_FUNCTION}
        ours = model(input_ids=ids).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(input_ids=ids).logits, ours, rtol=1e-3, atol=1e-3)
        named = {m.config._attn_implementation for n, m in model.named_modules() if n.endswith(".self_attn")}
        assert named == {"eager"}
