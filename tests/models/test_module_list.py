"""Models whose code comes with the checkpoint: experts in a list are recognised by what they compute, run by the
model's own block, and refused with the contract they break where they are not recognised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import fate
from fate.convert import convert
from fate.errors import UnsupportedModelError
from fate.load import store_identity
from fate.models.activation import recognise
from fate.models.adapter import find_moe_layers
from fate.models.adapters.module_list import recipe_of
from fate.tools.inspection import inspect_model

EXPERT = """
class Expert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x):
        return {formula}
"""
MODEL = """
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PreTrainedConfig):
    model_type = "own_moe"

    def __init__(self, **kwargs):
        for name, size in (("vocab_size", 99), ("hidden_size", 64), ("intermediate_size", 48)):
            setattr(self, name, kwargs.pop(name, size))
        self.num_experts, self.num_experts_per_tok = 6, 2
        self.num_hidden_layers, self.num_attention_heads = 2, 4
        super().__init__(**kwargs)

{expert}

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList([Expert(config) for _ in range(config.num_experts)])

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == number)
            out.index_add_(0, token, expert(flat[token]) * weights[token, rank, None])
        return x + out.view(x.shape)


class OwnModel(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, logits_to_keep=0, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))


OwnConfig.register_for_auto_class()
OwnModel.register_for_auto_class("AutoModelForCausalLM")
"""
SWIGLU = "self.w2(F.silu(self.w1(x)) * self.w3(x))"
ODD = "self.w2(F.silu(self.w1(x)) + self.w3(x))"


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A checkpoint with its own code; the parameter is what an expert computes."""
    path = tmp_path / "own"
    path.mkdir()
    code = MODEL.format(expert=EXPERT.format(formula=request.param))
    (path / "modeling_own.py").write_text(code)
    (path / "config.json").write_text(
        '{"model_type": "own_moe", "dtype": "float32", "auto_map": {"AutoConfig": "modeling_own.OwnConfig", '
        '"AutoModelForCausalLM": "modeling_own.OwnModel"}}'
    )
    torch.manual_seed(0)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("checkpoint", [SWIGLU], indirect=True)
def test_a_list_of_experts_runs(checkpoint: Path, tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).eval()
    store = convert(checkpoint, tmp_path / "store", expert_bits=32, dense_bits=16, trust_remote_code=True)
    assert (store / "modeling_own.py").is_file()
    prompt = torch.randint(0, 99, (1, 30), generator=torch.Generator().manual_seed(3))
    with fate.load(store, experts=1, trust_remote_code=True, on_plan=lambda plan, system: None) as model:
        with torch.no_grad():
            torch.testing.assert_close(model(prompt).logits, reference(prompt).logits, rtol=2e-5, atol=2e-5)
            model(prompt)
        stats = model.fate.stats().total
        assert stats.accesses - stats.hits > stats.first_accesses, "experts were evicted and read again"
        assert all(recognise(layer.experts) is not None for layer in find_moe_layers(model))


@pytest.mark.parametrize("checkpoint", [SWIGLU], indirect=True)
def test_code_is_not_run_unasked(checkpoint: Path, tmp_path: Path) -> None:
    for call in (lambda: convert(checkpoint, tmp_path / "store"), lambda: inspect_model(checkpoint)):
        with pytest.raises(UnsupportedModelError, match=r"'own_moe'.*--trust-remote-code"):
            call()


@pytest.mark.parametrize("checkpoint", [SWIGLU], indirect=True)
def test_a_cached_store_is_known_by_the_code_it_runs(checkpoint: Path) -> None:
    trusted = store_identity(checkpoint, True)
    assert trusted != store_identity(checkpoint, False)
    with (checkpoint / "modeling_own.py").open("a") as file:
        file.write("# another version\n")
    assert store_identity(checkpoint, True) != trusted


@pytest.mark.parametrize("checkpoint", [ODD], indirect=True)
def test_what_is_not_recognised_names_the_contract(checkpoint: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.experts is a ModuleList.*no feed-forward.*contract 1"):
        inspect_model(checkpoint, trust_remote_code=True)


class _Plain(nn.Module):
    """Grok's names, and no gate."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(8, 8, bias=bias)
        self.linear = nn.Linear(8, 8, bias=bias)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_1(self.act(self.linear(x)))


def test_recognition_goes_by_what_is_computed() -> None:
    with torch.device("meta"):
        recipe = recipe_of(_Plain())
        assert (recipe.first, recipe.second, recipe.down) == ("linear", None, "linear_1")
        with pytest.raises(ValueError, match="biases"):
            recipe_of(_Plain(bias=True))
        with pytest.raises(ValueError, match="no feed-forward network"):
            recipe_of(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)))
