"""Which arithmetic a family's module computes, known from the text of its `forward`.

transformers writes most modules of its families from the same text: 54 classes are Llama's RMSNorm under another name.
A module computes what its text says, so a native call may stand for every class whose text it stands for. The text is
what `ast.unparse` gives without annotations, docstrings and decorators, and is known by its digest. A class with any
other text keeps its own `forward`.

`make families` proves every form that occurs in a family against the class's own `forward`, and prints the digests of
the modules it does not know.

>>> RMS_NORMS[digest(Qwen2MoeRMSNorm.forward)].round_before_scale
True
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from fate.kernels.mixers import Rotation
from fate.kernels.ops import Scoring

ATTENTION_FUNCTION = "fate"  # what our function of attention is called in a configuration


@functools.cache
def digest(forward: Callable[..., Any]) -> str:
    """Twelve hexadecimal digits that stand for the text of a function; empty where there is no source to read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return ""
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns, node.decorator_list = None, []
    return hashlib.sha256(ast.unparse(function).encode()).hexdigest()[:12]


def form(module: object) -> str:
    """The digest of the `forward` of the module's class."""
    return digest(type(module).forward)  # type: ignore[attr-defined]


class NormForm(NamedTuple):
    """round_before_scale, plus_one: see `decode.Norm`. helper: the digest of the `_norm` that `forward` calls."""

    round_before_scale: bool
    plus_one: bool = False
    helper: str = ""


RMS_NORMS = {
    "9635bcd843f3": NormForm(True),  # Llama's: Qwen2-MoE, Qwen3-MoE, Mixtral, OLMoE, DeepSeek and 49 others
    "eef4e978a32a": NormForm(False),  # gpt-oss's: FlexOlmo, DeepSeek-V4
    "2dad5f576075": NormForm(False, plus_one=True, helper="6dc7d2ba16b4"),  # Qwen3-Next, Qwen3.5-MoE
}

# Embeddings times a number of their own -> the attribute that holds it.
SCALED_EMBEDDINGS = {
    "e918e504bff2": "scalar_embed_scale",  # Gemma's
    "e665096676b4": "embed_scale",  # NLLB's
}

# down_proj(act_fn(gate_proj(x)) * up_proj(x))
GATED_MLPS = {"7d2027d4464e"}


class RouterForm(NamedTuple):
    """renormalize: the chosen scores are divided by their sum; None: the module's `norm_topk_prob` says so.
    float32_scores: scores are not rounded to the activations' dtype. only_if: the attribute that must have this value.
    The others: see `decode.Router`; correction and groups are then the module's own."""

    renormalize: bool | None
    float32_scores: bool = False
    only_if: tuple[str, object] | None = None
    scoring: Scoring = Scoring.SOFTMAX
    float_logits: bool = False
    biased: bool = False
    group_best: int = 0  # 0: no groups, no correction and no scaling


ROUTERS = {
    "0b6a7b1ab2be": RouterForm(None),  # Qwen2-MoE, Qwen3-MoE, OLMoE, Qwen3-Next
    "af486dec6b00": RouterForm(True),  # Qwen3.5-MoE, Qwen3-VL-MoE
    "bfaa8bbbaf25": RouterForm(True, float32_scores=True),  # Mixtral, MiniMax
    "a28592ebbcbc": RouterForm(False),  # Jamba
    "51ff3b807e04": RouterForm(True),  # Aria: the softmax of the largest logits is the same
    "7e97d0535f83": RouterForm(True, only_if=("expert_selection_fn", "softmax")),  # Cohere2-MoE
    "471f06ea0bac": RouterForm(False, scoring=Scoring.SOFTMAX_OF_TOP, biased=True),  # gpt-oss
    # DeepSeek-V2, and DeepSeek-V3 with GLM-4.5 to 4.7, Kimi and others
    "cd261833a764": RouterForm(
        False, True, ("topk_method", ("greedy", "group_limited_greedy")), float_logits=True, group_best=1
    ),
    "b70233da0041": RouterForm(None, True, scoring=Scoring.SIGMOID, float_logits=True, group_best=2),
}


# Routers that choose in the order of one matrix's products, and the attributes that they do so with.
RANKED_BY_MATRIX: dict[str, dict[str, object]] = {
    **{text: {} for text, form in ROUTERS.items() if not form.biased and not form.group_best},
    "e098276e9f5e": {},  # GraniteMoE
    "5a8354e28623": {},  # Flint
    "471f06ea0bac": {"bias": None},  # gpt-oss, whose bias counts
    "cd261833a764": {"topk_method": "greedy"},  # DeepSeek-V2
}


class AttentionForm(NamedTuple):
    """q, k, v, rotation, attention over the whole cache or a window, o. only_if_none: an attribute of the module's
    configuration that must be None. gated, sinks: see `decode.Attention`."""

    only_if_none: str | None = None
    gated: bool = False
    sinks: bool = False


ATTENTIONS = {
    "865d17a1b6ed": AttentionForm(),  # Qwen2-MoE, PhiMoE, GraniteMoE
    "e0b15d778eec": AttentionForm(),  # Qwen3-MoE: norms of queries and keys, each head by itself
    "14c5d2e3db92": AttentionForm(),  # Qwen3-VL-MoE
    "71dd2bd8f9af": AttentionForm(),  # GLM-4.5 and 4.6: such norms where there are any, a part of a head rotated
    "4e06ba3cadcb": AttentionForm(),  # FlexOlmo, MiniMax-M2: norms over all heads at once
    "38eb7a675fc0": AttentionForm(),  # Mixtral, MiniMax
    "d7d607271e4a": AttentionForm(only_if_none="clip_qkv"),  # OLMoE
    "ba3864c351b2": AttentionForm(gated=True),  # Qwen3-Next, Qwen3.5-MoE
    "c6437559b381": AttentionForm(sinks=True),  # gpt-oss
}

# Digests of apply_rotary_pos_emb and of what it calls.
ROTATIONS = {
    ("4a8f8b85ee37", "7b6c9b425ca0"): Rotation.HALVES,  # all of a head
    ("d979b6dc501d", "7b6c9b425ca0"): Rotation.HALVES,  # its first part
    ("f3b10a49ba10", "6d486d97dc98"): Rotation.HALVES_ONCE,  # gpt-oss
}


class LatentForm(NamedTuple):
    """Latent attention. rotate: the function that turns queries and keys, by name and digest, and how it does; where
    `config.rope_interleave` says that another one does, `plain` is None or that one."""

    rotate: tuple[str, str, Rotation]
    plain: bool = False


LATENT_ATTENTIONS = {
    "00b58f51842e": LatentForm(  # DeepSeek-V3, GLM-4.7-Flash, Kimi
        ("apply_rotary_pos_emb_interleave", "b212a04cb3ff", Rotation.PAIRS_TO_HALVES), plain=True
    ),
    "38b10ee5e0cd": LatentForm(("apply_rotary_emb", "21c7d9d3911d", Rotation.PAIRS)),  # DeepSeek-V2
}
EXPAND_KV = "b90d6aa936d0"  # what they make keys and values of latents with

# The gated delta rule -> whether its two input matrices are in the order of key heads; otherwise there are four.
DELTA_RULES = {
    "7d0c1b43d722": False,  # Qwen3.5-MoE
    "0bddf67062b9": True,  # Qwen3-Next
}
GATED_NORM = "96920b139d7f"  # the norm of what it gives
# What it calls, by name.
DELTA_HELPERS = {
    "torch_recurrent_gated_delta_rule": "622cdad2a1a1",
    "causal_conv1d_update": "cc4232b99931",
    "l2norm": "c961b87a7261",
    "apply_mask_to_padding_states": "49d9a701d26c",
}

# x + mixer(input_layernorm(x)), then y + mlp(post_attention_layernorm(y)).
LAYERS = {
    "1a8125909341",
    "d4699009e63a",
    "f7dc478bf3c5",  # Qwen3-Next, Qwen3.5-MoE: attention or a delta rule
    "a6e4ee9acdf9",  # gpt-oss, whose MLP gives its scores too
}


class BlockForm(NamedTuple):
    """A sparse block: a router, experts, and a shared expert ("": there is none) whose output is added. scores: the
    block gives the router's scores too."""

    shared: str = ""
    router: str = "gate"
    scores: bool = False


BLOCKS = {
    "99cc8ec3bb8e": BlockForm(),  # Qwen3-MoE
    "af5142f06f49": BlockForm(),  # OLMoE, FlexOlmo
    "bb8252a71831": BlockForm(),  # Mixtral, MiniMax
    "a229bab296e8": BlockForm("shared_expert"),  # Qwen2-MoE, Qwen3-Next, Qwen3.5-MoE: times the sigmoid of its own gate
    "a26bd320fa07": BlockForm("shared_experts"),  # DeepSeek, GLM, Kimi and 18 others: as it is
    "78305e689641": BlockForm(router="router", scores=True),  # gpt-oss
}
