"""Helpers of the runtime's tests."""

import torch
from transformers import DynamicCache


@torch.inference_mode()
def stepwise_logits(model, ids, prompt_tokens=36):
    """Logits [tokens, vocabulary] of a prefill of `prompt_tokens` and then one decode step per remaining token."""
    cache = DynamicCache(config=model.config)
    pieces = [model(ids[:, :prompt_tokens], past_key_values=cache, use_cache=True).logits]
    for at in range(prompt_tokens, ids.shape[1]):
        pieces.append(model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(pieces, dim=1)[0]
