"""Which arithmetic a family's module computes, known from the text of its `forward`.

transformers writes most modules of its families from the same text: 54 classes are Llama's RMSNorm under another name.
A module computes what its text says, so a native call may stand for every class whose text it stands for. The text is
what `ast.unparse` gives without annotations, docstrings and decorators, and is known by its digest. A class with any
other text keeps its own `forward`.

`make families` proves every form that occurs in a family against the class's own `forward`, and prints the digests of
the modules it does not know.

>>> RMS_NORMS[digest(Qwen2MoeRMSNorm.forward)]
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


# RMSNorm -> whether the normalised value is rounded to the activations' dtype before it is multiplied by the weight.
RMS_NORMS = {
    "9635bcd843f3": True,  # Llama's: Qwen2-MoE, Qwen3-MoE, Mixtral, OLMoE, DeepSeek and 49 others
    "eef4e978a32a": False,  # gpt-oss's: FlexOlmo, DeepSeek-V4
}

# down_proj(act_fn(gate_proj(x)) * up_proj(x))
GATED_MLPS = {"7d2027d4464e"}


class RouterForm(NamedTuple):
    """A softmax over one matrix's products, the largest top_k. renormalize: they are divided by their sum; None: the
    module's `norm_topk_prob` says so. float32_scores: scores are not rounded to the activations' dtype. only_if: the
    attribute that must have this value."""

    renormalize: bool | None
    float32_scores: bool = False
    only_if: tuple[str, object] | None = None


ROUTERS = {
    "0b6a7b1ab2be": RouterForm(None),  # Qwen2-MoE, Qwen3-MoE, OLMoE, Qwen3-Next
    "af486dec6b00": RouterForm(True),  # Qwen3.5-MoE, Qwen3-VL-MoE
    "bfaa8bbbaf25": RouterForm(True, float32_scores=True),  # Mixtral, MiniMax
    "a28592ebbcbc": RouterForm(False),  # Jamba
    "51ff3b807e04": RouterForm(True),  # Aria: the softmax of the largest logits is the same
    "7e97d0535f83": RouterForm(True, only_if=("expert_selection_fn", "softmax")),  # Cohere2-MoE
}


# Routers that choose in the order of one matrix's products, and the attributes that they do so with.
RANKED_BY_MATRIX: dict[str, dict[str, object]] = {
    **{text: {} for text in ROUTERS},
    "e098276e9f5e": {},  # GraniteMoE
    "5a8354e28623": {},  # Flint
    "471f06ea0bac": {"bias": None},  # gpt-oss, whose bias counts
    "cd261833a764": {"topk_method": "greedy"},  # DeepSeek-V2
}


class AttentionForm(NamedTuple):
    """q, k, v, rotation in halves, attention over the whole cache, o. only_if_none: an attribute of the module's
    configuration that must be None."""

    only_if_none: str | None = None


ATTENTIONS = {
    "865d17a1b6ed": AttentionForm(),  # Qwen2-MoE, PhiMoE, GraniteMoE
    "e0b15d778eec": AttentionForm(),  # Qwen3-MoE: norms of queries and keys, each head by itself
    "14c5d2e3db92": AttentionForm(),  # Qwen3-VL-MoE
    "71dd2bd8f9af": AttentionForm(),  # GLM-4.5 and 4.6: such norms where there are any, a part of a head rotated
    "4e06ba3cadcb": AttentionForm(),  # FlexOlmo, MiniMax-M2: norms over all heads at once
    "38eb7a675fc0": AttentionForm(),  # Mixtral, MiniMax
    "d7d607271e4a": AttentionForm(only_if_none="clip_qkv"),  # OLMoE
}

# (apply_rotary_pos_emb, rotate_half): of all of a head, and of its first part.
ROTATIONS = {("4a8f8b85ee37", "7b6c9b425ca0"), ("d979b6dc501d", "7b6c9b425ca0")}

# x + self_attn(input_layernorm(x)), then y + mlp(post_attention_layernorm(y))
LAYERS = {"1a8125909341", "d4699009e63a"}

# Sparse blocks: gate and experts, and the name of a shared expert ("": there is none) whose output is added.
BLOCKS = {
    "99cc8ec3bb8e": "",  # Qwen3-MoE
    "af5142f06f49": "",  # OLMoE, FlexOlmo
    "bb8252a71831": "",  # Mixtral, MiniMax
    "a229bab296e8": "shared_expert",  # Qwen2-MoE, Qwen3-Next, Qwen3.5-MoE: times the sigmoid of its own gate
    "a26bd320fa07": "shared_experts",  # DeepSeek, GLM, Kimi and 18 others: as it is
}
