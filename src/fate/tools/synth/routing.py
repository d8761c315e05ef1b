"""How the weights of a synthetic store are shaped, which decides how its random routers route.

`uniform`: a token's own embedding (standard deviation EMBEDDING_STD, all else STD) is nearly all a gate sees. Routing
is nearly uniform over experts and jumps from token to token, the hard case for a cache; gate inputs hardly change over
layers, so the next layer's gate on this layer's input is right more often than a real model's.

`real` adds what makes trained models' routing cacheable and less foreseeable. Nothing depends on the text: the
weights are fixed, routing follows from the tokens fed.

- Temporal locality: the first layer's attention looks back over about twenty tokens and writes what it saw into the
  residual stream, CONTEXT times as large as the token's own embedding, so that neighbouring tokens share a part of
  every gate input. It looks there by position: queries and keys get one and the same bias on the slow pairs of the
  rotary embedding (Su et al., arXiv 2104.09864), whose product, a mean of cosines of the distance, is largest at
  distance zero and flat around it.
- Prediction by the next gate: the norms before the gates differ from layer to layer, as trained ones do: log-normal
  weights, spread more widely in shallow layers, where trained models' gates are the least predictable too.

Measured at full depth (INT4, 64 tokens of prompt and 128 decoded; mean over English prose, word problems and Python):
hits of a cache per layer that holds 25 / 50 / 75% of the experts, share of a layer's top k among the next gate's top k
(recall) and top 2k, in percent.

    model and routing             LRU        LFU        Belady     recall  top 2k
    qwen1.5-moe-a2.7b real        45 72 89   44 70 88   71 88 96   79      96
    deepseek-moe-16b  real        40 68 87   39 66 86   67 86 96   79      97
    DeepSeek-V2-Lite, trained     45 70 90   1-6 less   72 88 97   79
    qwen1.5-moe-a2.7b uniform     29 56 80   34 61 83   60 82 93   93      100
    deepseek-moe-16b  uniform     27 54 79   30 58 81   58 80 93   88      100

>>> ROUTINGS.get("real")(config).std("model.layers.0.self_attn.o_proj.weight")
0.30681818181818177
"""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedConfig

from fate.registry import Registry

STD = 0.02
EMBEDDING_STD = 256 * STD
CONTEXT = 0.54

_CONTEXT_NORM = 0.22  # of the mean of a few dozen unit-variance tokens under the weights that recency gives them
_RECENCY = 10.0  # attention logit at distance zero over the mean of all distances
_SLOW_PAIRS = (0.005, 0.05)  # radians per token
_CONTENT_STD = STD / 8  # of the first layer's queries and keys: position decides, not content
_SPREAD_DEEP, _SPREAD_SHALLOW, _SPREAD_DEPTH = 0.009, 0.15, 0.15  # variance of log weights, decaying over this depth

ROUTINGS: Registry[type[UniformRouting]] = Registry("routing")


@ROUTINGS.register("uniform")
class UniformRouting:
    """Standard deviations of matrices and values of vectors, by a tensor's key in the state dict."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config

    def std(self, key: str) -> float:
        """Standard deviation of the matrix `key`, whose mean is zero."""
        return EMBEDDING_STD if key.endswith("embed_tokens.weight") else STD

    def vector(self, key: str, noise: torch.Tensor) -> torch.Tensor:
        """float32 [size], the one-dimensional tensor `key`. noise: float32 [size], standard normal, its own."""
        return torch.full_like(noise, 1.0 if "norm" in key else 0.0)


@ROUTINGS.register("real")
class RealRouting(UniformRouting):
    """Attention of layer 0 and the norms before the gates shaped; config: with biased queries and keys."""

    def std(self, key: str) -> float:
        if key.endswith(("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight")):
            return _CONTENT_STD
        if key.endswith("layers.0.self_attn.o_proj.weight"):
            return self._context_std()
        return super().std(key)

    def vector(self, key: str, noise: torch.Tensor) -> torch.Tensor:
        if key.endswith(("layers.0.self_attn.q_proj.bias", "layers.0.self_attn.k_proj.bias")):
            return self._recency_bias().repeat(noise.numel() // self._head_dim)
        if key.endswith("post_attention_layernorm.weight"):
            spread = self._spread(int(key.split(".")[-3]))
            return torch.exp(math.sqrt(spread) * noise - spread)  # mean square 1: gates keep their confidence
        return super().vector(key, noise)

    @property
    def _head_dim(self) -> int:
        config = self._config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def _context_std(self) -> float:
        """What gives attention's output CONTEXT times the embeddings' standard deviation."""
        values_std = _CONTEXT_NORM * STD * math.sqrt(self._config.hidden_size)
        return CONTEXT * EMBEDDING_STD / (values_std * math.sqrt(self._config.num_attention_heads * self._head_dim))

    def _recency_bias(self) -> torch.Tensor:
        """float32 [head_dim]: q = k = this gives logits of _RECENCY times the mean over slow pairs of cos(distance)."""
        half = self._head_dim // 2  # a pair is (i, i + half)
        speeds = self._config.rope_parameters["rope_theta"] ** -(torch.arange(half) / half)
        slow = (speeds >= _SLOW_PAIRS[0]) & (speeds <= _SLOW_PAIRS[1])
        size = math.sqrt(_RECENCY * math.sqrt(self._head_dim) / int(slow.sum()))
        return torch.cat([slow * size, torch.zeros(half)])

    def _spread(self, layer: int) -> float:
        """Variance of the logarithm of the weights of the norm before `layer`'s gate."""
        first = getattr(self._config, "first_k_dense_replace", 0)
        depth = max(0, layer - first) / max(1, self._config.num_hidden_layers - 1 - first)
        return _SPREAD_DEEP + _SPREAD_SHALLOW * math.exp(-depth / _SPREAD_DEPTH)
